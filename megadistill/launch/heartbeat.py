"""Who is still there: every rank gives a sign once a second, so that a rank whose collective fails can say whom it
waited for.

The signs go through the store that the ranks met at. They hold a counter, the step, and the place in the code that the
rank's main thread is at (sampled, so nothing else has to report).
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

from megadistill.errors import MegadistillError
from megadistill.parallel.context import ParallelContext

LOST = 87  # exit code of a rank whose collective failed because another rank is gone or gives no sign
_EVERY_S, _LISTEN_S, _STORE_S = 1.0, 4.0, 10.0
_NO_SIGN = {"count": 0, "step": 0, "place": "not begun", "host": "an unknown host"}
_PACKAGE = f"{os.sep}megadistill{os.sep}"


class Heartbeat:
    """This rank's signs. ``step``: the step that it is in, set by the loop."""

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self.step = 0
        self._rank, self._world_size, self._main = rank, world_size, threading.main_thread().ident
        self._done = threading.Event()
        # Connections of their own: the main thread may be using the other one, for as long as it likes.
        self._sending, self._asking = store.clone(), store.clone()
        for connection in (self._sending, self._asking):
            connection.set_timeout(timedelta(seconds=_STORE_S))
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")
        self._thread.start()

    def stop(self) -> None:
        """No more signs."""
        self._done.set()

    def describe_lost_ranks(self) -> str:
        """Which ranks give no sign and where they were last (listens for some seconds)."""
        try:
            before = self._signs()
            time.sleep(_LISTEN_S)
            after = self._signs()
        except Exception:  # the store is gone, and with it the rank that kept it
            return "rank 0, where the ranks meet, gives no sign: it is dead or stopped"
        silent = [r for r in range(self._world_size) if r != self._rank and before[r]["count"] == after[r]["count"]]
        if silent:
            names = ", ".join(_shown(rank, after[rank]) for rank in silent)
            return f"{names}: no sign of life, dead or stopped"
        behind = min(range(self._world_size), key=lambda rank: after[rank]["step"])
        return (
            f"all ranks are alive, the slowest is {_shown(behind, after[behind])}; parallel.timeout_s may be too short"
        )

    def _run(self) -> None:
        count = 0
        while True:
            count += 1
            sign = {"count": count, "step": self.step, "place": self._place(), "host": os.uname().nodename}
            try:
                self._sending.set(f"megadistill/sign/{self._rank}", json.dumps(sign))
            except Exception:
                return  # rank 0 is gone: the next collective will say so
            if self._done.wait(_EVERY_S):
                return

    def _signs(self) -> list[dict[str, Any]]:
        keys = [f"megadistill/sign/{rank}" for rank in range(self._world_size)]
        # Asking for a sign that was never given would wait for it.
        return [json.loads(self._asking.get(key)) if self._asking.check([key]) else _NO_SIGN for key in keys]

    def _place(self) -> str:
        frame = sys._current_frames().get(self._main or 0)
        return _innermost(frame) if frame is not None else ""


@contextmanager
def lost_ranks_reported(context: ParallelContext) -> Iterator[Heartbeat | None]:
    """Inside, a failed collective ends this process with one line, which names the ranks that gave no sign, and exit
    code 87. Yields None in a world of one."""
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
            f"megadistill [rank {context.rank}]: in step {heartbeat.step + 1}, {where}: the other ranks did not answer "
            f"(parallel.timeout_s={context.timeout_s:g}): {heartbeat.describe_lost_ranks()}"
        )
        print(line, file=sys.stderr, flush=True)
        sys.stdout.flush()
        # Taking process groups down would wait for ranks that are gone.
        os._exit(LOST)
    finally:
        heartbeat.stop()


def lost_connection(error: BaseException | None) -> BaseException | None:
    """The error of a collective that failed because of another rank, among an error and those that led to it (what
    cleans up behind it fails, too). The backends raise plain RuntimeErrors."""
    while error is not None:
        text = str(error)
        if isinstance(error, (dist.DistBackendError, dist.DistNetworkError)) or (
            isinstance(error, RuntimeError) and ("gloo" in text or "Connection closed by peer" in text)
        ):
            return error
        error = error.__cause__ or error.__context__
    return None


def _shown(rank: int, sign: dict[str, Any]) -> str:
    return f"rank {rank} on {sign['host']} (in step {sign['step'] + 1}, {sign['place']})"


def _innermost(where: FrameType | TracebackType | None) -> str:
    """The innermost function of the project in a stack, as file:function."""
    found = "outside of megadistill"
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
