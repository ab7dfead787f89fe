"""How the ranks of a job wait for rank 0 while it makes the assets.

The process group does not exist yet, so rank 0 reports its progress in a file on the shared file system: a counter that
a thread increments about once a second. A waiting rank looks for changes, and its own monotonic clock measures how long
there was none. Clocks of two machines and times of files are never compared. A file belongs to one job and ``attempt``
to one start of rank 0, so that a leftover of another job or of an earlier attempt is not taken for progress.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megadistill.errors import DataError
from megadistill.files import write_json
from megadistill.launch.launchers import MEETING_POINT
from megadistill.observability.redact import redact

BEAT_S = 1.0
POLL_S = 0.5
# A network file system may show a change a minute late.
PATIENCE_S = 300.0
# Equal on all ranks of a job, different for jobs that run at the same time.
_JOB_VARIABLES = ("SLURM_JOB_ID", *MEETING_POINT)


class Stopped(Exception):
    """The job was asked to stop before the assets were complete."""


def never() -> bool:
    """Always False: ``is_stopping`` for callers without signal handling."""
    return False


@dataclass(frozen=True)
class Beat:
    """What rank 0 reports. ``outcome`` is None while it works, else "stopped" or the error's message."""

    attempt: str
    count: int
    outcome: str | None = None


def beat_file(folder: Path, environment: Mapping[str, str] = os.environ) -> Path:
    """The file in which rank 0 of this job reports its progress on the assets in ``folder``."""
    job = "-".join(environment[name] for name in _JOB_VARIABLES if name in environment)
    return folder / ".progress" / f"{re.sub(r'[^A-Za-z0-9.-]', '_', job) or 'alone'}.json"


@contextmanager
def beating(file: Path) -> Iterator[None]:
    """Reports progress from a thread while the block runs, and afterwards how it ended (no file: well)."""
    attempt, done = uuid.uuid4().hex, threading.Event()

    def beat() -> None:
        for count in itertools.count():
            _write(file, Beat(attempt, count))
            if done.wait(BEAT_S):
                return

    thread = threading.Thread(target=beat, daemon=True, name="asset progress")
    thread.start()
    outcome = None
    try:
        yield
    except BaseException as error:
        outcome = "stopped" if isinstance(error, Stopped) else redact(str(error)) or type(error).__name__
        raise
    finally:
        done.set()
        thread.join()
        if outcome is None:
            file.unlink(missing_ok=True)
        else:
            _write(file, Beat(attempt, -1, outcome))


def wait_for_rank0(
    is_ready: Callable[[], bool],
    file: Path,
    is_stopping: Callable[[], bool] = never,
    *,
    patience_s: float = PATIENCE_S,
) -> None:
    """Waits until ``is_ready()``.

    Args:
        is_ready: Whether the assets are complete.
        file: Where rank 0 reports its progress, by ``beating``.
        is_stopping: Whether this process was asked to stop.
        patience_s: Seconds without progress after which waiting ends.

    Raises:
        Stopped: This rank or rank 0 was asked to stop.
        DataError: Rank 0 reported an error, or nothing new for ``patience_s`` seconds.
    """
    last = _read(file)
    is_news, changed_at = False, time.monotonic()
    while not is_ready():
        if is_stopping():
            raise Stopped
        beat = _read(file)
        if beat != last:
            # What is written while we wait is from rank 0 of this attempt.
            last, is_news, changed_at = beat, True, time.monotonic()
        is_stale = time.monotonic() - changed_at > patience_s
        if beat is not None and beat.outcome is not None and (is_news or is_stale):
            if beat.outcome == "stopped":
                raise Stopped
            raise DataError(beat.outcome)
        if is_stale:
            raise DataError(
                f"rank 0 has reported no progress for {patience_s:.0f} s while it makes what run.prepare names; "
                f"is {file.parent.parent} on a file system that all machines share?"
            )
        time.sleep(POLL_S)


def _write(file: Path, beat: Beat) -> None:
    """A beat that cannot be written is left out: the next one may succeed."""
    with suppress(OSError):
        write_json(file, asdict(beat))


def _read(file: Path) -> Beat | None:
    """None where there is no file that can be read."""
    try:
        return Beat(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
