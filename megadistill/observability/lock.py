"""One writer a place: a lock that ends with its process, however that dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megadistill.errors import ConfigError


@contextmanager
def only_writer(path: Path, what: str) -> Iterator[None]:
    """Holds ``path`` (made if need be) for this process.

    Raises ConfigError when another process holds it; a file system without locks is no reason to stop.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise ConfigError(
                f"{what} is being written by another run (process {holder}); end it first, or choose another place"
            ) from None
        except OSError:
            yield
            return
        file.truncate(0)
        file.write(f"{os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield
