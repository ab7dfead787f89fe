"""Distills large causal language models on ZeRO-3 and tensor parallelism, revised on sequence, token and span level."""

__version__ = "0.1.0"

IGNORE_INDEX = -100  # label of a position without a target, as in torch
