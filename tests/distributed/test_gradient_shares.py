"""What each loss term contributes to the gradient: the same on every layout, and that of a backward pass of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megadistill.losses import LossConfig
from megadistill.losses.reference import reference_loss
from megadistill.parallel import VocabShard
from megadistill.parallel.output_head import OutputHead
from megadistill.training.micro_batch import GRADIENT_NAMES, GlobalCounts, MicroBatch, MicroBatchLoss
from tests.support.objective import TOP_K, Problem, leaf, make_gate, make_problem
from tests.support.spawn import run_ranks

CONFIG = LossConfig(sft=0.7, dac_kl=1.3, span=2.0, top_k=TOP_K, temperature=1.5)
CONFIGS = [CONFIG, CONFIG.replace(temperature=1.0, policy=1.1)]


def diagnosed(problem: Problem, shard: VocabShard, config: LossConfig) -> dict[str, float]:
    """The squares of one micro-batch whose references are its responses."""
    classes = slice(shard.start, shard.stop)
    heads = [OutputHead(head.weight[classes], head.bias[classes], shard) for head in (problem.student, problem.teacher)]
    index = (problem.labels >= 0).nonzero().squeeze(-1)
    batch: Any = None
    micro_batch = MicroBatch(
        batch, index, problem.labels[index], index, problem.labels[index], (len(index),), (len(index),),
        problem.pair_mask[index], problem.teacher.hidden[index], num_tokens=len(index),
    )  # fmt: skip
    counts = GlobalCounts(problem.num_tokens, problem.num_tokens, problem.num_pairs)
    loss = MicroBatchLoss(micro_batch, counts, config, make_gate(), heads[1], is_diagnosed=True)
    loss(problem.student.hidden.unsqueeze(0), heads[0])
    return {name: float(value) for name, value in loss.gradient_squares.items()}


@pytest.mark.parametrize("config", CONFIGS, ids=["tempered", "policy"])
@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_the_squares_are_those_of_each_term_alone(tp_size: int, config: LossConfig) -> None:
    problem = make_problem(ignored=0.0)

    def body(rank: int) -> dict[str, float]:
        return diagnosed(problem, VocabShard.split(problem.num_classes, tp_size, rank, dist.group.WORLD), config)

    found = run_ranks(body, tp_size)
    student = leaf(problem.student)
    output = reference_loss(
        student, problem.teacher, problem.labels, problem.pair_mask, make_gate(), config,
        num_tokens=problem.num_tokens, num_pairs=problem.num_pairs,
    )  # fmt: skip
    for name in GRADIENT_NAMES:
        term = name.rpartition("/")[2]
        if getattr(config, term) == 0:
            assert all(name not in squares for squares in found)
            continue
        (gradient,) = torch.autograd.grad(
            getattr(config, term) * getattr(output, term), student.hidden, retain_graph=True
        )
        for squares in found:
            assert squares[name] == pytest.approx(float(gradient.square().sum()), rel=1e-9)
