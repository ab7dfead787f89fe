"""Heartbeats: every rank writes one a second, so that a rank whose collective fails can name the lost ranks.

Beats go through the store of the rendezvous. A beat is a counter, the step, and the place in the code where the rank's
main thread is (sampled, so that nothing else has to report it).
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from megadistill.errors import ExitCode, MegadistillError
from megadistill.parallel.context import ParallelContext

_EVERY_S, _LISTEN_S, _STORE_S = 1.0, 4.0, 10.0
_NO_BEAT = {"count": 0, "step": 0, "place": "not started", "host": "an unknown host"}
_PACKAGE = f"{os.sep}megadistill{os.sep}"


class Heartbeat:
    """Writes this rank's beats from a thread.

    Attributes:
        step: The step that the rank is in, counted from 0; the loop sets it.
    """

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self.step = 0
        self._rank, self._world_size, self._main = rank, world_size, threading.main_thread().ident
        self._done = threading.Event()
        # Separate connections: the main thread may block on the original one for minutes.
        self._sending, self._reading = store.clone(), store.clone()
        for connection in (self._sending, self._reading):
            connection.set_timeout(timedelta(seconds=_STORE_S))
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")
        self._thread.start()

    def stop(self) -> None:
        """Ends the beats."""
        self._done.set()

    def describe_lost_ranks(self) -> str:
        """Which ranks have stopped beating, and where they last were; takes ``_LISTEN_S`` seconds."""
        try:
            before = self._beats()
            time.sleep(_LISTEN_S)
            after = self._beats()
        except Exception:  # the store is gone, and with it the rank that kept it
            return "rank 0, where the ranks meet, does not respond: it is dead or stopped"
        silent = [r for r in range(self._world_size) if r != self._rank and before[r]["count"] == after[r]["count"]]
        if silent:
            names = ", ".join(_describe(rank, after[rank]) for rank in silent)
            return f"no heartbeat from {names}: dead or stopped"
        behind = min(range(self._world_size), key=lambda rank: after[rank]["step"])
        return (
            f"all ranks are alive, the slowest is {_describe(behind, after[behind])}; "
            "parallel.timeout_s may be too short"
        )

    def _run(self) -> None:
        count = 0
        while True:
            count += 1
            beat = {"count": count, "step": self.step, "place": self._place(), "host": os.uname().nodename}
            try:
                self._sending.set(_key(self._rank), json.dumps(beat))
            except Exception:
                return  # rank 0 is gone: the next collective will fail
            if self._done.wait(_EVERY_S):
                return

    def _beats(self) -> list[dict[str, Any]]:
        keys = [_key(rank) for rank in range(self._world_size)]
        # Reading a key that was never set would wait for it.
        return [json.loads(self._reading.get(key)) if self._reading.check([key]) else _NO_BEAT for key in keys]

    def _place(self) -> str:
        frame = sys._current_frames().get(self._main or 0)
        return _innermost(frame) if frame is not None else ""


@contextmanager
def lost_ranks_reported(context: ParallelContext) -> Iterator[Heartbeat | None]:
    """A failed collective of the block ends this process with ``ExitCode.LOST_RANKS``.

    One line on standard error names the ranks that do not respond.

    Yields:
        This rank's heartbeat; None in a world of one.
    """
    if context.world_size == 1:
        yield None
        return
    heartbeat = Heartbeat(dist.distributed_c10d._get_default_store(), context.rank, context.world_size)
    try:
        yield heartbeat
    except MegadistillError:
        raise
    except Exception as error:
        lost = lost_connection(error)
        if lost is None:
            raise
        where = _innermost(lost.__traceback__)
        line = (
            f"megadistill [rank {context.rank}]: in step {heartbeat.step + 1}, {where}: a collective failed "
            f"(parallel.timeout_s={context.timeout_s:g}): {heartbeat.describe_lost_ranks()}"
        )
        print(line, file=sys.stderr, flush=True)
        sys.stdout.flush()
        # Destroying the process groups would wait for ranks that are gone.
        os._exit(ExitCode.LOST_RANKS)
    finally:
        heartbeat.stop()


def lost_connection(error: BaseException | None) -> BaseException | None:
    """The error of a collective that failed because of another rank; None where there is none.

    It is ``error`` or one that led to it: after it, cleaning up fails, too. The backends raise plain RuntimeErrors.
    """
    while error is not None:
        text = str(error)
        if isinstance(error, (dist.DistBackendError, dist.DistNetworkError)) or (
            isinstance(error, RuntimeError) and ("gloo" in text or "Connection closed by peer" in text)
        ):
            return error
        error = error.__cause__ or error.__context__
    return None


def _key(rank: int) -> str:
    return f"megadistill/beat/{rank}"


def _describe(rank: int, beat: dict[str, Any]) -> str:
    return f"rank {rank} on {beat['host']} (in step {beat['step'] + 1}, {beat['place']})"


def _innermost(where: FrameType | TracebackType | None) -> str:
    """The innermost function of the project in a stack, as file:function."""
    found = "outside megadistill"
    if isinstance(where, FrameType):
        frame: FrameType | None = where
        while frame is not None:
            if _PACKAGE in frame.f_code.co_filename:
                return _named(frame)
            frame = frame.f_back
        return found
    while where is not None:
        if _PACKAGE in where.tb_frame.f_code.co_filename:
            found = _named(where.tb_frame)
        where = where.tb_next
    return found


def _named(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename.rpartition(_PACKAGE)[2]}:{frame.f_code.co_name}"
