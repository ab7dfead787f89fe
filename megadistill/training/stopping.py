"""Stopping on a signal: all ranks stop after the same step, with a checkpoint of it.

SIGTERM (a scheduler, a launcher), SIGINT (Ctrl-C) and SIGUSR1 (SLURM's warning before its limit) ask for it; so does
a launcher that dies without a word, because DeepSpeed's leaves its ranks running. A rank that was asked cannot stop
alone: the others would wait for it in the next collective. So every rank tells the others after every step, and all
stop when one was asked.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from megadistill.engines.ancestors import Ancestor, ancestors
from megadistill.parallel.context import ParallelContext

STOPPED = 85  # exit code of a run that was stopped and has saved
ORPHANED = 86  # exit code of a rank that could not stop in time after its launcher had died
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed.run", "torch/distributed/run")
_PROGRAMS = ("mpirun", "mpiexec", "prterun", "prted", "orted", "slurmstepd")
_POLL_S = 1.0


class StopRequest:
    """What this rank was asked; ``agreed`` is what all ranks know."""

    def __init__(self) -> None:
        self.signal = 0

    def ask(self, number: int) -> None:
        """Remembers the request; a second Ctrl-C does not wait for the end of the step."""
        if self.signal == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number

    def agreed(self, context: ParallelContext) -> str | None:
        """Name of a signal that any rank got, the same on every rank (one all-reduce of a number over the world)."""
        number = int(context.max_over_world(torch.tensor(float(self.signal), device=context.device)))
        return signal.Signals(number).name if number else None


@contextmanager
def stop_requests(grace_s: float) -> Iterator[StopRequest]:
    """Turns signals into requests while it is entered, and the death of a launcher into one. A rank that has not ended
    ``grace_s`` seconds after its launcher's death is ended (exit code 86): no orphan stays."""
    request = StopRequest()

    def handle(number: int, _: FrameType | None) -> None:
        request.ask(number)

    before: dict[int, Any] = {number: signal.signal(number, handle) for number in _SIGNALS}
    watch = _LauncherWatch(lambda: request.ask(signal.SIGTERM), grace_s)
    watch.start()
    try:
        yield request
    finally:
        watch.done.set()
        for number, handler in before.items():
            signal.signal(number, handler)


class _LauncherWatch(threading.Thread):
    """Looks after the launchers above this process until ``done``."""

    def __init__(self, on_death: Callable[[], None], grace_s: float) -> None:
        super().__init__(daemon=True, name="launcher watch")
        self._on_death, self._grace_s, self.done = on_death, grace_s, threading.Event()
        self._launchers = launchers_above()

    def run(self) -> None:
        while not self.done.wait(_POLL_S):
            if not all(launcher.is_alive() for launcher in self._launchers):
                self._on_death()
                # A step may hang, because other ranks are gone already.
                if not self.done.wait(self._grace_s):
                    os._exit(ORPHANED)
                return


def launchers_above() -> list[Ancestor]:
    """The ancestors that are launchers; empty where /proc does not tell."""
    return [
        above
        for above in ancestors()
        # The program or the module that Python runs, not just any argument.
        if above.program in _PROGRAMS or any(name in word for word in above.words[:4] for name in _LAUNCHERS)
    ]
