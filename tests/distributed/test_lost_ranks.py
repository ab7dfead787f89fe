"""A missing rank: every process group gives up after the run's timeout, and a line names the rank."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megadistill.errors import ExitCode
from megadistill.launch.heartbeat import Heartbeat, lost_connection
from megadistill.parallel.context import ParallelContext
from tests.support.runs import ROOT, free_port
from tests.support.spawn import run_ranks


def _alone(rank: int) -> list[str]:
    """Rank 0 calls a collective of each group that a run has; rank 1 does not."""
    import deepspeed

    from megadistill.config.parallel import ZeroSection
    from megadistill.engines.ds_config import engine_config
    from megadistill.models.families import FAMILIES
    from tests.support.runs import join_deepspeed

    join_deepspeed(rank)
    context = ParallelContext.build(2, 2, torch.device("cpu"))
    model = torch.nn.Linear(4, 4)
    options = {"micro_batch_size": 1, "zero": ZeroSection(), "device_type": "cpu"}
    config = engine_config(zero_stage=3, tp_size=1, dtype="fp32", family=FAMILIES["llama"], **options)
    deepspeed.initialize(model=model, config=config, optimizer=torch.optim.AdamW(model.parameters()))
    context.set_all_timeouts()
    groups = [group for group in dist.distributed_c10d._world.pg_map if dist.get_world_size(group) == 2]
    assert context.tp_group in groups and len(groups) > 2  # the world, ours, DeepSpeed's
    found = []
    for group in groups:
        if rank == 0:
            try:
                dist.all_reduce(torch.ones(1), group=group)
                found.append("passed")
            except RuntimeError as error:
                found.append("lost" if lost_connection(error) is error else str(error))
    if rank == 1:
        time.sleep(2.5 * len(groups) + 5)
    # The world is broken by now: the last barrier of the test's ranks would be, too.
    dist.barrier = lambda *_, **__: None  # type: ignore[assignment]
    dist.destroy_process_group = lambda *_, **__: None  # type: ignore[assignment]
    return found


def test_every_group_has_the_timeout() -> None:
    import deepspeed  # noqa: F401  once, before the forks

    found = run_ranks(_alone, 2)[0]
    assert found and set(found) == {"lost"}


def test_errors_behind_a_lost_rank_are_traced_back_to_it() -> None:
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")
    behind = ValueError("cannot free")
    behind.__context__ = lost
    assert lost_connection(behind) is lost
    assert lost_connection(ValueError("gloo")) is None
    assert lost_connection(None) is None


def test_the_silent_rank_is_named() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=10))
    beats = [Heartbeat(store, rank, 3) for rank in range(3)]
    beats[1].step = 7
    try:
        beats[2].stop()
        time.sleep(1.5)
        line = beats[0].describe_lost_ranks()
        assert "no heartbeat from rank 2 on " in line and "rank 1" not in line
        beats[2] = Heartbeat(store, 2, 3)
        beats[0].step = beats[2].step = 8
        time.sleep(1.5)
        assert "all ranks are alive, the slowest is rank 1 on " in beats[0].describe_lost_ranks()
    finally:
        for beat in beats:
            beat.stop()


SCRIPT = """
import sys, time, torch, torch.distributed as dist
from datetime import timedelta
sys.path.insert(0, sys.argv[1])
from megadistill.parallel.context import ParallelContext
from megadistill.launch.heartbeat import lost_ranks_reported
rank = int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[2]}", rank=rank, world_size=2)
context = ParallelContext.build(1, 3, torch.device("cpu"))
with lost_ranks_reported(context) as heartbeat:
    context.set_all_timeouts()
    dist.barrier()
    heartbeat.step = 4
    if rank == 0 or sys.argv[4] == "slow":
        if rank == 1:
            time.sleep(20)
        context.sum_over_dp(torch.ones(1))
"""


@pytest.mark.parametrize(("how", "words"), [("gone", "rank 1 on"), ("slow", "all ranks are alive")])
def test_one_line_and_an_exit_code(how: str, words: str) -> None:
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(ROOT), port, str(rank), how], stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    _, told = ranks[0].communicate(timeout=120)
    ranks[1].communicate(timeout=120)
    line = told.strip().splitlines()[-1]
    assert ranks[0].returncode == ExitCode.LOST_RANKS, told
    assert line.startswith("megadistill [rank 0]: in step 5, parallel/context.py:sum_over_dp: ") and words in line
