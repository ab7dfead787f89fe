"""Where a plan finds the configurations of a run's models, which need not have been downloaded or made yet."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megadistill.checkpoint.model_folder import model_folder
from megadistill.config.schema import RunConfig
from megadistill.config.shipped import shipped_root
from megadistill.data.hub import is_hub_name


def shipped_shape(name: str) -> Path | None:
    """The shipped configuration of a model of the hub; None where there is none.

    Args:
        name: OWNER/NAME.
    """
    file = shipped_root() / "configs" / "models" / f"{name.replace('/', '--')}.json"
    return file if is_hub_name(name) and file.is_file() else None


def with_configurations(
    config: RunConfig, made: Mapping[str, Mapping[str, Any]], folder: Path
) -> tuple[RunConfig, tuple[str, ...]]:
    """The configuration with the files that describe its models in place of the models, and a line about each change.

    Args:
        config: The configuration of the run.
        made: Path -> transformers configuration of models that ``run.prepare`` would make.
        folder: Where those are written.

    Raises:
        CheckpointError: A run has no checkpoint.
    """
    notes, paths = [], {}
    for role in ("teacher", "student"):
        path = getattr(config.model, role).path
        if path is None or (role == "teacher" and not config.needs_teacher):
            continue
        key = f"model.{role}.path"
        paths[key], note = _configuration(path, made, folder / f"{role}.json")
        if note:
            notes.append(f"{key}: {note}")
    return with_model_paths(config, paths), tuple(notes)


def with_model_paths(config: RunConfig, paths: Mapping[str, str]) -> RunConfig:
    """The configuration with other paths of its models.

    Args:
        config: The configuration of the run.
        paths: "model.teacher.path" or "model.student.path" -> the path.
    """
    model = config.model
    for key, path in paths.items():
        role = key.split(".")[1]
        model = model.model_copy(update={role: getattr(model, role).model_copy(update={"path": path})})
    return config.model_copy(update={"model": model})


def _configuration(path: str, made: Mapping[str, Mapping[str, Any]], target: Path) -> tuple[str, str]:
    key = path.removesuffix("/config.json")
    if not Path(path).exists() and key in made:
        target.write_text(json.dumps(made[key]), encoding="utf-8")
        return str(target), f"{path} as run.prepare will make it, with its largest vocabulary"
    shipped = shipped_shape(path)
    if shipped is not None:
        return str(shipped), f"the shapes of {path} from configs/models (the hub is not asked)"
    found = model_folder(path)
    inner = Path(found) / "config.json"
    return (str(inner) if inner.is_file() else found), ""
