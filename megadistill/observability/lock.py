"""One writer a place: a lock that ends with its process, however that dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megadistill.errors import ConfigError


def try_lock(file: IO[Any]) -> bool:
    """Whether this process now holds the open file until it closes it; True too where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@contextmanager
def exclusive_lock(path: Path, what: str) -> Iterator[None]:
    """Holds ``path`` (made if need be) for this process.

    Raises ConfigError when another process holds it; a file system without locks is no reason to stop.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
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
