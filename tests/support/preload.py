"""Imports of a whole run, made once in a parent: every fork that made them itself would spend seconds of its own."""

from __future__ import annotations

import functools
import importlib

_FAMILIES = (
    "gemma", "gemma2", "gemma3", "gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo2", "opt", "phi3",
    "qwen2", "qwen3", "smollm3",
)  # fmt: skip
_MODULES = (
    "deepspeed",
    "megadistill.planning.dry_run",
    "megadistill.training.loop",
    "megadistill.training.setup",
    *(f"transformers.models.{family}.modeling_{family}" for family in _FAMILIES),
)


@functools.cache
def preload() -> None:
    """Imports DeepSpeed, the models' families and the training loop."""
    for name in _MODULES:
        importlib.import_module(name)
