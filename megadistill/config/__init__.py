"""Typed configuration of a run."""

from megadistill.config.load import dump_resolved, load_config, require
from megadistill.config.schema import RunConfig

__all__ = ["RunConfig", "dump_resolved", "load_config", "require"]
