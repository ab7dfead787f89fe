"""Distil large causal language models on ZeRO-3 and tensor parallelism with sequence, token and span level revision."""

__version__ = "0.1.0"
