"""What the options of the token loss do to a student that is trained with them, in a toy that can be computed exactly.

Contexts have clean distributions over classes with a Zipf prior; the teacher adds 20 % of noise; the student is of low
rank. No target is sampled. A student is judged by KL(clean || student) on contexts that it has not seen.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from megadistill.losses import Head, LossConfig, QuantileGate, distill_loss, virtual_step
from megadistill.parallel import VocabShard

NUM_CLASSES, WIDTH, RANK, NUM_CONTEXTS = 200, 12, 8, 384
SHARD = VocabShard(0, NUM_CLASSES, NUM_CLASSES)


def contexts(seed: int, noise: str) -> tuple[Tensor, Tensor, Tensor]:
    """(features, clean probabilities, the teacher's); the second half is for the judgment."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2 * NUM_CONTEXTS, WIDTH, generator=generator).tanh()
    weight = torch.randn(WIDTH, NUM_CLASSES, generator=generator) / WIDTH**0.5 * 5
    prior = -1.1 * torch.arange(1, NUM_CLASSES + 1).log()
    clean = (features @ weight + prior).softmax(-1)
    if noise == "none":
        return features, clean, clean
    spread = torch.full_like(clean, 1.0)
    if noise == "context":  # some other classes in each context: nothing that could be learned
        spread = torch.rand(clean.shape, generator=generator).pow(8)
    return features, clean, 0.8 * clean + 0.2 * spread / spread.sum(-1, keepdim=True)


def distance(noise: str, seed: int = 0, steps: int = 200, **changes: object) -> float:
    """KL(clean || student) after training."""
    return trained(noise, seed, steps, **changes)[0]


@functools.cache
def trained(noise: str, seed: int = 0, steps: int = 200, **changes: object) -> tuple[float, float]:
    """KL(clean || student) after training, and the mean l of the last 50 steps."""
    features, clean, teacher = contexts(seed, noise)
    config = LossConfig(sft=0, span=0, **changes)
    generator = torch.Generator().manual_seed(100 + seed)
    inner = (torch.randn(WIDTH, RANK, generator=generator) * 0.3).requires_grad_()
    weight = (torch.randn(NUM_CLASSES, RANK, generator=generator) * 0.1).requires_grad_()
    bias = torch.zeros(NUM_CLASSES, requires_grad=True)
    optimizer = torch.optim.Adam([inner, weight, bias], lr=0.02)
    gate = QuantileGate.from_config(config) if config.uses_gate else None
    gate_optimizer = torch.optim.Adam(gate.parameters(), lr=3e-3) if gate is not None else None
    eye = torch.eye(NUM_CLASSES)
    # References, of which the gate alone learns: a draw from each clean distribution.
    of_references = torch.Generator().manual_seed(200 + seed)
    written = torch.multinomial(clean, 1, generator=of_references).squeeze(-1)
    lowers = []
    for step in range(steps):
        chosen = torch.randint(0, NUM_CONTEXTS, (64,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / steps)
        optimizer.zero_grad()
        ahead = None
        if config.uses_gate and config.gate_objective == "student":
            other = torch.randint(0, NUM_CONTEXTS, (64,), generator=of_references)
            ahead = virtual_step(Head((features[other] @ inner).detach(), weight, bias), written[other], SHARD, None)
        output = distill_loss(
            Head(features[chosen] @ inner, weight, bias), Head(teacher[chosen].log(), eye),
            torch.zeros(64, dtype=torch.int64), torch.zeros(64, dtype=torch.bool), gate, config, SHARD,
            num_tokens=64, num_pairs=0, ahead=ahead,
        )  # fmt: skip
        output.loss.backward()
        lowers.append(float(output.mean_lower))
        optimizer.step()
        if gate is not None and gate_optimizer is not None:
            gate_optimizer.step()
            gate_optimizer.zero_grad()
    with torch.no_grad():
        log_q = (features[NUM_CONTEXTS:] @ inner @ weight.T + bias).log_softmax(-1)
        held_out = clean[NUM_CONTEXTS:]
        return float((held_out * (held_out.log() - log_q)).sum(-1).mean()), sum(lowers[-50:]) / 50


@pytest.mark.parametrize("noise", ["context", "uniform"])
def test_truncation_removes_the_noise_of_tails_and_the_bucket_only_its_shape(noise):
    plain = distance(noise, clip="off")
    truncated = distance(noise, clip="fixed", lower=0.1, remainder="truncate")
    assert truncated < 0.94 * plain
    assert truncated < distance(noise, clip="fixed", lower=0.1) < plain
    assert distance(noise, clip="entropy", lower=0.3, remainder="truncate") < truncated


def test_clipping_a_clean_teacher_costs():
    plain = distance("none", clip="off")
    assert (
        plain
        < distance("none", clip="fixed", lower=0.1)
        < distance("none", clip="fixed", lower=0.1, remainder="truncate")
    )


@pytest.mark.parametrize("noise", ["none", "context"])
def test_a_constant_at_what_a_minimizing_gate_learns_does_as_well(noise):
    learned, lower = trained(noise)
    assert 0.03 < lower < 0.1  # what it does is not nothing
    assert learned == pytest.approx(distance(noise, clip="fixed", lower=lower), rel=0.01)


def test_a_gate_that_learns_from_the_references_sees_whether_the_teachers_tail_is_noise():
    """From the same start it opens on a clean teacher, and on a noisy one it clips as much as it may."""
    clean, opened = trained("none", gate_objective="student")
    noisy, closed = trained("context", gate_objective="student")
    assert opened < 0.01 and closed > 0.09
    assert trained("none")[1] == pytest.approx(trained("context")[1], abs=0.01)  # a minimizing one does not see it
    assert clean < distance("none") and noisy < distance("context")
