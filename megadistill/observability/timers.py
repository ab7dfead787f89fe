"""Seconds of the phases of a step."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Timers:
    """Named phases, in seconds.

    Example::

        with timers("rollout"):
            ...
        timers.seconds()  # {"time/rollout_s": 1.25}

    A phase that runs several times adds up.

    Args:
        synchronize: Called at both ends of a phase, for devices that run queued work: ``torch.cuda.synchronize``.
    """

    def __init__(self, synchronize: Callable[[], object] | None = None) -> None:
        self._synchronize = synchronize
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times the block as phase ``name``."""
        start = self._now()
        try:
            yield
        finally:
            self._seconds[name] += self._now() - start

    def seconds(self) -> dict[str, float]:
        """Seconds per phase since the last call, as metrics."""
        seconds = {f"time/{name}_s": value for name, value in self._seconds.items()}
        self._seconds.clear()
        return seconds

    def _now(self) -> float:
        if self._synchronize is not None:
            self._synchronize()
        return time.perf_counter()
