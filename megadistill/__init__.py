"""Distills large causal language models on ZeRO-3 and tensor parallelism, revised on sequence, token and span level.

From Python (docs/examples): ``distill``, ``load_config``, ``open_model``, ``TextSource``; the losses are in
``megadistill.losses``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megadistill.api import OpenModel, distill, open_model
    from megadistill.config.load import load_config
    from megadistill.data.sample import Sample
    from megadistill.generation.sources.base import SourceInputs, TextSource

__version__ = "0.1.0"

IGNORE_INDEX = -100  # label of a position without a target, as in torch

# Name -> module; imported when it is used, so that ``import megadistill`` is quick.
_PUBLIC = {
    "OpenModel": "megadistill.api",
    "Sample": "megadistill.data.sample",
    "SourceInputs": "megadistill.generation.sources.base",
    "TextSource": "megadistill.generation.sources.base",
    "distill": "megadistill.api",
    "load_config": "megadistill.config.load",
    "open_model": "megadistill.api",
}
__all__ = [
    "IGNORE_INDEX",
    "OpenModel",
    "Sample",
    "SourceInputs",
    "TextSource",
    "__version__",
    "distill",
    "load_config",
    "open_model",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'megadistill' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
