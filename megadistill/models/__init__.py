"""Models: families, loading, and the files of sharded ones."""
