"""Checkpoints: writing, loading, exporting, resharding, merging."""
