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
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from megadistill.launch.ancestors import PDSH, Ancestor, ancestors, over_ssh

STOPPED = 85  # exit code of a run that was stopped and has saved
ORPHANED = 86  # exit code of a rank that could not stop in time after its launcher had died
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed.run", "torch/distributed/run")
_PROGRAMS = (*PDSH, "mpirun", "mpiexec", "prterun", "prted", "orted", "slurmstepd")
_POLL_S = 1.0


class StopRequest:
    """What this rank was asked: ``signal``, the number of one, or 0."""

    def __init__(self) -> None:
        self.signal, self.grace_s = 0, 120.0

    def ask(self, number: int) -> None:
        """Remembers the request; a second Ctrl-C does not wait for the end of the step."""
        if self.signal == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turns signals into requests while it is entered, and the death of a launcher into one. A rank that has not ended
    ``request.grace_s`` seconds after its launcher's death is ended (exit code 86): no orphan stays."""
    request = StopRequest()

    def handle(number: int, _: FrameType | None) -> None:
        request.ask(number)

    before: dict[int, Any] = {number: signal.signal(number, handle) for number in _SIGNALS}
    watch = _LauncherWatch(request)
    watch.start()
    try:
        yield request
    finally:
        watch.done.set()
        for number, handler in before.items():
            # Who has asked once may go on asking, and must not kill what is about to end as it was asked.
            is_over = request.signal and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if is_over else handler)


class _LauncherWatch(threading.Thread):
    """Looks after the launchers above this process until ``done``."""

    def __init__(self, request: StopRequest) -> None:
        super().__init__(daemon=True, name="launcher watch")
        self._request, self.done = request, threading.Event()
        self._launchers = launchers_above()

    def run(self) -> None:
        while not self.done.wait(_POLL_S):
            if not all(launcher.is_alive() for launcher in self._launchers):
                self._request.ask(signal.SIGTERM)
                # A step may hang, because other ranks are gone already.
                if not self.done.wait(self._request.grace_s):
                    os._exit(ORPHANED)
                return


def launchers_above() -> list[Ancestor]:
    """The ancestors that are launchers, also through ssh on this machine; empty where /proc does not tell."""
    above = list(ancestors())
    beyond = [process for launcher in above for process in over_ssh(launcher)]
    return [process for process in (*above, *beyond) if _is_launcher(process)]


def _is_launcher(process: Ancestor) -> bool:
    """By the program, or the module that Python runs, not by just any argument."""
    return process.program in _PROGRAMS or any(name in word for word in process.words[:4] for name in _LAUNCHERS)
