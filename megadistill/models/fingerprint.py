"""What stands for a model on disk: enough to notice another one in the same place, without reading weights whole."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_FILES = ("config.json", "*.safetensors", "shards/*", "pytorch_model*.bin", "*.index.json")
_END_BYTES = 1 << 20


def model_fingerprint(path: str) -> dict[str, str]:
    """File name -> size and checksum, of a folder's configuration and weights or of a configuration file; empty for a
    hub name. Times are not in it. Raises OSError for what cannot be read."""
    local = Path(path)
    if not local.exists():
        return {}
    files = [local] if local.is_file() else sorted({file for pattern in _FILES for file in local.glob(pattern)})
    return {str(file.relative_to(local.parent if local.is_file() else local)): _describe_file(file) for file in files}


def _describe_file(path: Path) -> str:
    """Size and a checksum of the first and the last MiB: training changes both."""
    found = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        for start in sorted({0, max(0, size - _END_BYTES)}):
            file.seek(start)
            found.update(file.read(_END_BYTES))
    return f"{size} bytes, checksum {found.hexdigest()}"
