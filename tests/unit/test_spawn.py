"""The small jobs of the tests themselves: what one of them breaks must not stop the next."""

from __future__ import annotations

import io
import os
import signal

import pytest

from megadistill.observability.progress import progress_bar
from tests.support.spawn import RankError, run_ranks


def test_a_rank_killed_while_it_draws_its_bar_stops_no_later_one() -> None:
    """A bar of the parent makes the lock of all bars, which its forks would share."""
    for _ in progress_bar(range(1), description="parent", stream=io.StringIO()):
        pass

    def die(rank: int) -> None:
        bar = progress_bar(description="rank", total=1, stream=io.StringIO())
        bar.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    def draw(rank: int) -> int:
        return sum(progress_bar(range(3), description="rank", stream=io.StringIO()))

    with pytest.raises(RankError, match="died without a result"):
        run_ranks(die, 1)
    assert run_ranks(draw, 1, timeout_s=20) == [3]
