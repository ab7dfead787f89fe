"""Stopping on a signal: all ranks stop after the same step, with a checkpoint of it.

SIGTERM (a scheduler, a launcher), SIGINT (Ctrl-C), SIGUSR1 (SLURM's warning before its limit) and SIGHUP (a closed
terminal, unless nohup had it ignored) request it; so does the death of a launcher, because DeepSpeed's leaves its ranks
running. A rank cannot stop alone: the others would wait
for it in the next collective. So every rank tells the others after every step, and all stop when one was asked.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from megadistill.errors import ExitCode
from megadistill.launch.ancestors import is_alive, launchers_above

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_OUTPUTS = (1, 2)  # descriptors of standard output and error
_POLL_S = 1.0


class StopRequest:
    """Whether this rank was asked to stop.

    Attributes:
        signal: The number of the first signal that came, or 0.
        grace_s: Seconds that this rank has to finish its step after its launcher's death.
    """

    def __init__(self) -> None:
        self.signal, self.grace_s = 0, 120.0

    def ask(self, number: int) -> None:
        """Remembers the request; a second Ctrl-C does not wait for the end of the step."""
        if self.signal == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turns signals, and the death of a launcher, into a request while the block runs.

    A rank that still runs ``request.grace_s`` seconds after its launcher's death exits with ``ExitCode.ORPHANED``, so
    that no orphan is left behind.
    """
    request = StopRequest()
    terminals = [descriptor for descriptor in _OUTPUTS if os.isatty(descriptor)]

    def handle(number: int, _: FrameType | None) -> None:
        request.ask(number)
        if number == signal.SIGHUP:
            _leave(terminals)

    is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    numbers = [number for number in _SIGNALS if not (is_nohup and number == signal.SIGHUP)]
    before: dict[int, Any] = {number: signal.signal(number, handle) for number in numbers}
    watch = _LauncherWatch(request)
    watch.start()
    try:
        yield request
    finally:
        watch.done.set()
        for number, handler in before.items():
            # Launchers repeat their signal; a repeated one must not kill a process that is already ending. Ctrl-C does.
            is_repeated = request.signal and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if is_repeated else handler)


def _leave(terminals: Iterable[int]) -> None:
    """Writes nowhere instead of to a terminal that is gone: an error there would end the run before it has saved."""
    for descriptor in terminals:
        if not os.isatty(descriptor):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


class _LauncherWatch(threading.Thread):
    """Watches the launchers above this process until ``done`` is set."""

    def __init__(self, request: StopRequest) -> None:
        super().__init__(daemon=True, name="launcher watch")
        self._request, self.done = request, threading.Event()
        self._launchers = launchers_above()

    def run(self) -> None:
        while not self.done.wait(_POLL_S):
            if not all(map(is_alive, self._launchers)):
                self._request.ask(signal.SIGTERM)
                # The step may hang, because other ranks may have ended already.
                if not self.done.wait(self._request.grace_s):
                    os._exit(ExitCode.ORPHANED)
                return
