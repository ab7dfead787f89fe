"""Processes: their grid, collectives, slices of the vocabulary, random numbers that no layout changes."""
