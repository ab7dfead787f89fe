"""Where a step's text comes from: one module for each value of ``generation.mode``, found by its name.

A module of that name defines ``SOURCE``, a subclass of ``base.TextSource``. That and the value in
``config.schema.GenerationSection.mode`` are all that a new source needs.
"""

from __future__ import annotations

import importlib

from megadistill.config.schema import RunConfig
from megadistill.generation.sources.base import TextSource


def source_class(config: RunConfig) -> type[TextSource]:
    """The text source that ``generation.mode`` names."""
    module = importlib.import_module(f"{__name__}.{config.generation.mode}")
    source: type[TextSource] = module.SOURCE
    return source
