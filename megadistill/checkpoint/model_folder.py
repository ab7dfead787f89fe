"""The model that a user's path or name means."""

from __future__ import annotations

from pathlib import Path

from megadistill.checkpoint.manifest import HF_FOLDER, LATEST, MANIFEST, find_checkpoint, is_pointer
from megadistill.data.hub import offline_if_needed
from megadistill.errors import CheckpointError


def model_folder(path: str) -> str:
    """The Hugging Face folder of a checkpoint or of a run's latest one; anything else, also a hub name, as it is.

    Raises:
        CheckpointError: A run without a checkpoint, or a checkpoint without a model.
    """
    offline_if_needed([path])
    local = Path(path)
    if not is_pointer(local) and (not local.is_dir() or (local / "config.json").exists()):
        return path
    if (
        is_pointer(local)
        or (local / "checkpoints").is_dir()
        or any((folder / name).exists() for folder in (local, local / "checkpoints") for name in (LATEST, MANIFEST))
    ):
        folder = find_checkpoint(local) / HF_FOLDER
        if not folder.is_dir():
            raise CheckpointError(f"{path} has no model: {folder} is missing")
        return str(folder)
    return path
