"""Every rank makes as many passes as the one that needs most."""

from __future__ import annotations

import torch

from megadistill.config.train import TrainSection
from megadistill.data.sample import Sample
from megadistill.parallel.context import ParallelContext
from megadistill.training.passes import plan_passes
from tests.support.spawn import run_ranks


def _passes(rank: int) -> list[list[int]]:
    context = ParallelContext.build(1, 60.0, torch.device("cpu"))
    lengths = [(8, 8, 8, 8), (30, 30, 30, 30), (70, 4, 30, 4)][rank]
    samples = [Sample(i, (1,) * (length - 2), "", (2, 3)) for i, length in enumerate(lengths)]
    return plan_passes(samples, TrainSection(micro_batch_tokens=64), context)


def test_all_ranks_make_equally_many_passes() -> None:
    assert run_ranks(_passes, 3) == [[[0, 1, 2, 3], []], [[0, 1], [2, 3]], [[0], [2, 1, 3]]]
