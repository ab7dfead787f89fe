"""One writer per place: a lock that is released when its process ends, however it ends."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import lock_descriptor

from megadistill.errors import ConfigError

_POLL_S = 0.05


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
def exclusive_lock(path: Path, what: str, wait_s: float = 0.0) -> Iterator[None]:
    """Holds ``path`` (made if need be) for this process; the file stays, with the last holder's name in it.

    Args:
        path: The lock file.
        what: What it protects, for the error.
        wait_s: Seconds to wait while another process holds it.

    Raises:
        ConfigError: Another process holds it. A file system without locks is not a reason to stop.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        deadline = time.monotonic() + wait_s
        while not (is_held := try_lock(file)) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if not is_held:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise ConfigError(
                f"{what} is being written by another run (process {holder}); end it first, or choose another place"
            )
        file.truncate(0)
        file.write(f"{os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield
