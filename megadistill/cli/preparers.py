"""The preparers: functions that make the assets that ``run.prepare`` names.

They are on a higher floor than this package: they are named here, and imported when one is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pkgutil import resolve_name
from typing import Any

from megadistill.config.schema import RunConfig

# Value of run.prepare -> MODULE:FUNCTION. FUNCTION(config, is_stopping) runs on every rank before the process group
# exists, and returns False when is_stopping() became true before everything was made.
PREPARERS = {
    "demo": "megadistill.demo.assets:ensure_assets",
    "smoke": "megadistill.demo.assets:ensure_assets",
}
# Value of run.prepare -> MODULE:FUNCTION. FUNCTION(config) tells the configurations of the models that would be made.
SHAPES = {
    "demo": "megadistill.demo.assets:model_configs",
    "smoke": "megadistill.demo.assets:model_configs",
}


def models_to_make(config: RunConfig) -> Mapping[str, Mapping[str, Any]]:
    """Path -> transformers configuration of the models that ``run.prepare`` makes."""
    if config.run.prepare == "none":
        return {}
    made: Mapping[str, Mapping[str, Any]] = resolve_name(SHAPES[config.run.prepare])(config)
    return made


def prepare(config: RunConfig, is_stopping: Callable[[], bool]) -> bool:
    """Makes what ``run.prepare`` names, where it is still missing.

    Args:
        config: The configuration of the run.
        is_stopping: Whether this process was asked to stop.

    Returns:
        True when everything exists, False when the process was asked to stop before.
    """
    if config.run.prepare == "none":
        return True
    return bool(resolve_name(PREPARERS[config.run.prepare])(config, is_stopping))
