"""Processes: their grid, collectives, slices of the vocabulary, random numbers that no layout changes."""

from megadistill.parallel.vocab import VocabShard

__all__ = ["VocabShard"]
