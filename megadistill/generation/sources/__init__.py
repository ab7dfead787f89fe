"""Where a step's text comes from: one module for each value of ``generation.mode``, found by its name.

A module of that name defines ``SOURCE``, a subclass of ``base.TextSource``. That and the value in
``config.schema.GenerationSection.mode`` are all that a new source needs. One outside of this package is named by
``generation.source``.
"""

from __future__ import annotations

import importlib

from megadistill.config.schema import RunConfig
from megadistill.errors import ConfigError, first_line
from megadistill.generation.sources.base import TextSource


def source_class(config: RunConfig) -> type[TextSource]:
    """The text source of a run: that of ``generation.source``, else that of ``generation.mode``.

    Raises:
        ConfigError: ``generation.source`` names none.
    """
    if config.generation.source is not None:
        return _of_user(config.generation.source)
    module = importlib.import_module(f"{__name__}.{config.generation.mode}")
    source: type[TextSource] = module.SOURCE
    return source


def _of_user(name: str) -> type[TextSource]:
    module, _, attribute = name.partition(":")
    what, setting = f"generation.source={name}", "generation.source"
    if not module or not attribute:
        raise ConfigError(f"{what}: a text source is MODULE:CLASS", setting=setting)
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # the user's own code may raise anything
        raise ConfigError(
            f"{what}: {module} cannot be imported ({first_line(error)}); is its folder in PYTHONPATH?", setting=setting
        ) from error
    if not (isinstance(found, type) and issubclass(found, TextSource)):
        raise ConfigError(f"{what}: {module} has no TextSource of that name", setting=setting)
    return found
