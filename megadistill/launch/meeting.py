"""Ranks that may be absent, hung or wrong, and find out about one another without hanging: everything has a deadline.

They meet at the run's own place (launch/rendezvous.py), but nobody waits for all. What they tell one another are keys
of the store. A collective is only entered when every rank of its group has said that it is there, and runs in a thread
that is given up after the timeout.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from megadistill.errors import TopologyError
from megadistill.launch.rendezvous import open_store

T = TypeVar("T")
ARRIVAL = 4  # times as long as any other stage: importing the libraries may take minutes
_POLL_S, _CLOCK_S = 0.02, 3.0


class MissingRanksError(Exception):
    """Ranks did not come to a stage.

    Attributes:
        ranks: Their numbers.
    """

    def __init__(self, stage: str, ranks: Sequence[int]) -> None:
        super().__init__(stage)
        self.stage, self.ranks = stage, list(ranks)


class StuckError(Exception):
    """A call was not done in time, and its thread goes on."""


class Meeting:
    """This rank's side of a meeting.

    Args:
        rank: This rank.
        world_size: Number of ranks that should come.
        timeout_s: Seconds that each stage may take.

    Attributes:
        store: The store, for process groups.

    Raises:
        TopologyError: Rank 0 does not answer.
    """

    def __init__(self, rank: int, world_size: int, timeout_s: float) -> None:
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        try:
            found = open_store(timedelta(seconds=ARRIVAL * timeout_s), waits=False)
        except (dist.DistError, RuntimeError, TimeoutError):
            where = f"{os.environ['MASTER_ADDR']} port {os.environ['MASTER_PORT']}"
            raise TopologyError(
                f"rank {rank} finds no rank 0 at {where} within {ARRIVAL * timeout_s:g} s: it has not started, or a "
                "firewall or a wrong MASTER_ADDR is between them"
            ) from None
        self.store = dist.PrefixStore("doctor", found)

    def post(self, topic: str, value: Any) -> None:
        """Tells the others."""
        self.store.set(f"{topic}/{self.rank}", json.dumps(value))

    def gather(self, topic: str, ranks: Iterable[int], timeout_s: float | None = None) -> dict[int, Any]:
        """What ranks have posted, of those that did so in time.

        Args:
            topic: Of their ``post``.
            ranks: Who is asked.
            timeout_s: Seconds for all together; default: those of the meeting.
        """
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        waiting, found = set(ranks), {}
        while True:
            for rank in sorted(waiting):
                if self.store.check([f"{topic}/{rank}"]):
                    found[rank] = json.loads(self.store.get(f"{topic}/{rank}"))
                    waiting.discard(rank)
            if not waiting or time.monotonic() > deadline:
                return dict(sorted(found.items()))
            time.sleep(_POLL_S)

    def arrive(self, stage: str, ranks: Collection[int]) -> None:
        """Waits for ranks to arrive at a stage.

        Raises:
            MissingRanksError: They did not within the timeout.
        """
        self.post("place", stage)
        self.post(f"arrived/{stage}", True)
        missing = set(ranks) - self.gather(f"arrived/{stage}", ranks).keys()
        if missing:
            raise MissingRanksError(stage, sorted(missing))

    def skew(self, others: Sequence[int]) -> float | None:
        """Seconds that this rank's clock is ahead of rank 0's, give or take half of what a message takes.

        Rank 0 answers one rank after the other, and returns 0; None where it did not.

        Args:
            others: All ranks but 0 that are there.
        """
        if self.rank == 0:
            for rank in others:
                self.store.set(f"clock/turn/{rank}", "")
                if self._heard(f"clock/asked/{rank}", _CLOCK_S):
                    self.store.set(f"clock/answer/{rank}", repr(time.time()))
            return 0.0
        if not self._heard(f"clock/turn/{self.rank}", self.timeout_s + _CLOCK_S * len(others)):
            return None
        begun = time.time()
        self.store.set(f"clock/asked/{self.rank}", "")
        if not self._heard(f"clock/answer/{self.rank}", _CLOCK_S):
            return None
        middle = (begun + time.time()) / 2
        return middle - float(self.store.get(f"clock/answer/{self.rank}"))

    def _heard(self, key: str, seconds: float) -> bool:
        try:
            self.store.wait([key], timedelta(seconds=seconds))
        except (dist.DistError, RuntimeError):
            return False
        return True


def within(seconds: float, call: Callable[[], T]) -> T:
    """The result of ``call``, which runs in a thread.

    Raises:
        StuckError: It is not done in time. The thread is left alone, so the process must end by ``os._exit``.
        Exception: What ``call`` raised.
    """
    result: list[T] = []
    error: list[BaseException] = []

    def run() -> None:
        try:
            result.append(call())
        except BaseException as raised:
            error.append(raised)

    thread = threading.Thread(target=run, daemon=True, name="doctor")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise StuckError
    if error:
        raise error[0]
    return result[0]
