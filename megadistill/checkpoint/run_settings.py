"""The settings that a model was trained with, where its path leads into a run directory."""

from __future__ import annotations

import warnings
from pathlib import Path

from megadistill.checkpoint.manifest import is_pointer
from megadistill.config.load import load_config
from megadistill.config.schema import RunConfig

RESOLVED = "resolved.yaml"
# From RUN/checkpoints/step_N/hf up to RUN.
_MAX_LEVELS = 3


def settings_of_run(path: str | Path) -> tuple[Path, RunConfig] | None:
    """resolved.yaml of the run that a path belongs to, and the settings in it; None where there is none.

    Args:
        path: A run directory, a checkpoint in it, the ``hf`` folder of that, or a file that names a checkpoint.

    Raises:
        ConfigError: The file is there but cannot be read.
    """
    local = Path(path)
    if not local.is_dir() and not is_pointer(local):
        return None
    local = local.resolve()
    for folder in (local, *local.parents[:_MAX_LEVELS]):
        if (folder / RESOLVED).is_file() and (folder == local or (folder / "checkpoints") in (local, *local.parents)):
            return folder / RESOLVED, load_resolved(folder)
    return None


def load_resolved(run_dir: Path) -> RunConfig:
    """The settings of a run as it was started last; an old spelling in them is not worth a warning.

    Raises:
        ConfigError: They cannot be read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return load_config(run_dir / RESOLVED, is_record=True)
