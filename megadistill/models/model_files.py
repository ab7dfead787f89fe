"""The files of a model: in a local folder, or those that the cache holds of a hub name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megadistill.data.hub import split_revision
from megadistill.errors import ConfigError, first_line
from megadistill.files import os_errors_as

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"


def model_file(path: str, name: str) -> Path | None:
    """The file of a model that is called ``name``; a missing one of a hub name is asked for once.

    Args:
        path: A model folder, a configuration file, or a hub name.
        name: The file's name; a configuration file is its own ``config.json``.

    Returns:
        The local or cached file; None where there is none.
    """
    from transformers.utils import cached_file

    local = Path(path)
    if local.is_file():
        return local if name == CONFIG else None
    if local.is_dir():
        return local / name if (local / name).is_file() else None
    repository, revision = split_revision(path)
    file = cached_file(
        repository,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if file is None else Path(file)


def files_folder(path: str) -> Path | None:
    """The folder of a model's or a tokenizer's files: its own, or that of the cache; None for a configuration file."""
    local = Path(path)
    if local.exists():
        return local if local.is_dir() else None
    found = (model_file(path, name) for name in (CONFIG, "tokenizer_config.json", "tokenizer.json"))
    return next((file.parent for file in found if file is not None), None)


def commit_of(name: str) -> str | None:
    """The commit that a hub name, or its revision, stands for now; None where neither hub nor cache says."""
    folder = files_folder(name)
    return None if folder is None or folder.parent.name != "snapshots" else folder.name


def read_model_json(path: str, name: str) -> dict[str, Any] | None:
    """The content of a JSON file of a model; None where there is none.

    Args:
        path: As for ``model_file``.
        name: The file's name.

    Raises:
        ConfigError: It cannot be read, or is not a JSON object.
    """
    file = model_file(path, name)
    if file is None:
        return None
    with os_errors_as(ConfigError, file, "cannot be read"):
        raw = file.read_bytes()
    try:
        content = json.loads(raw.decode("utf-8-sig"))
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} is not a JSON object")
    return content
