"""One writer per place: a lock that is released when its process ends, however it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import lock_descriptor

from megadistill.errors import ConfigError


def try_lock(file: IO[Any]) -> bool:
    """Locks an open file for this process until it closes it.

    Returns:
        Whether the lock is held; also True where the file system has no locks.
    """
    try:
        return lock_descriptor(file.fileno(), blocking=False)
    except OSError:
        return True


@contextmanager
def exclusive_lock(path: Path, what: str) -> Iterator[None]:
    """Holds ``path`` (made if need be) for this process; the file stays, with the last holder's name in it.

    Args:
        path: The lock file.
        what: What it protects, for the error.

    Raises:
        ConfigError: Another process holds it. A file system without locks is not a reason to stop.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        if not try_lock(file):
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise ConfigError(
                f"{what} is being written by another run (process {holder}); end it first, or choose another place"
            )
        file.truncate(0)
        file.write(f"{os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield
