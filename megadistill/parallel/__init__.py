from megadistill.parallel.vocab import VocabShard

__all__ = ["VocabShard"]
