"""A fingerprint of a model on disk: enough to notice another model in the same place, without reading all weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_FILES = ("config.json", "*.safetensors", "shards/*", "pytorch_model*.bin", "*.index.json")
_END_BYTES = 1 << 20


def model_fingerprint(path: str) -> dict[str, str]:
    """Describes the files of a model; times are not part of it.

    Args:
        path: A model folder, a configuration file, or a hub name.

    Returns:
        File name -> size and checksum, of the configuration and the weights; empty for a hub name.

    Raises:
        OSError: A file cannot be read.
    """
    local = Path(path)
    if not local.exists():
        return {}
    files = [local] if local.is_file() else sorted({file for pattern in _FILES for file in local.glob(pattern)})
    return {str(file.relative_to(local.parent if local.is_file() else local)): _describe_file(file) for file in files}


def fingerprint_of(config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]], *more: Any) -> str:
    """Stands for a model's type, the shapes of its parameters, and whatever else makes it another model."""
    described = (sorted(shapes.items()), *more) if more else sorted(shapes.items())
    return f"{config.model_type}-{hashlib.blake2b(repr(described).encode(), digest_size=4).hexdigest()}"


def _describe_file(path: Path) -> str:
    """Size and a checksum of the first and the last MiB: training changes both."""
    checksum = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        for start in sorted({0, max(0, size - _END_BYTES)}):
            file.seek(start)
            checksum.update(file.read(_END_BYTES))
    return f"{size} bytes, checksum {checksum.hexdigest()}"
