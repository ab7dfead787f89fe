"""The policy term: its value and gradients, what it teaches, and where it is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megadistill.config.schema import RunConfig
from megadistill.errors import ConfigError, DataError
from megadistill.losses import Head, LossConfig, TeacherTopK, distill_loss
from megadistill.parallel import VocabShard
from tests.support.backends import BACKENDS
from tests.support.objective import (
    TOP_K,
    assert_same,
    make_gate,
    make_problem,
    make_rows,
    run_fused,
    run_reference,
    with_top_k,
)

CONFIG = LossConfig(sft=0.7, dac_kl=1.3, span=2.0, policy=1.7, top_k=TOP_K, chunk_tokens=5)
ALONE: dict[str, Any] = {"sft": 0.0, "dac_kl": 0.0, "span": 0.0, "policy": 1.0}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reward", ["token", "return"])
def test_the_term_equals_the_reference(backend: str, reward: str) -> None:
    """With and without other terms, in chunks that cut rows, with halo tokens and without."""
    for share, chunk in itertools.product([0.0, 0.2], [1, 5, "auto"]):
        problem, gate = make_rows(make_problem(), share), make_gate()
        config = CONFIG.replace(policy_reward=reward, chunk_tokens=chunk, backend=backend)
        output, gradients, _ = run_fused(problem, config, gate)
        assert_same(output, gradients, run_reference(problem, config, gate), 1e-10)
        assert float(output.policy) != 0


@pytest.mark.parametrize("changes", [ALONE, {"span_relation": "log"}, {"clip": "off", "divergence": "reverse_kl"}])
@pytest.mark.parametrize("reward", ["token", "return"])
def test_beside_other_terms(changes: dict[str, Any], reward: str) -> None:
    problem = make_rows(make_problem(ignored=0.1), 0.2)
    problem.token_weights = torch.linspace(0.1, 2.0, len(problem.labels), dtype=torch.float64)
    for num_listed in (0, 1, 20):
        case = with_top_k(problem, num_listed) if num_listed else problem
        config = CONFIG.replace(policy_reward=reward, **changes)
        values, expected = run_reference(case, config, make_gate())
        for name in ("sft", "dac_kl", "span"):
            values[name] = values[name] * (getattr(config, name) > 0)
        output, gradients, _ = run_fused(case, config, make_gate())
        assert_same(output, gradients, (values, expected), 1e-10)


def test_no_token_counts() -> None:
    problem = make_rows(make_problem(ignored=2.0))
    output, _, _ = run_fused(problem, CONFIG.replace(policy_reward="return"), make_gate())
    assert float(output.policy) == 0


def test_a_row_knows_nothing_of_the_others() -> None:
    """Returns of one row are the same beside other rows, of whatever gains."""
    config = LossConfig(policy_reward="return", chunk_tokens=4, **ALONE)
    problem = make_problem(length=12, ignored=0.0)
    assert isinstance(problem.teacher, Head)
    whole, of_whole, _ = run_fused(replace(problem, rows=torch.arange(3).repeat_interleave(4)), config, None)
    for row in range(3):
        part = slice(4 * row, 4 * row + 4)
        alone = replace(
            problem, student=replace(problem.student, hidden=problem.student.hidden[part]),
            teacher=Head(problem.teacher.hidden[part], problem.teacher.weight, problem.teacher.bias),
            labels=problem.labels[part], pair_mask=problem.pair_mask[part],
        )  # fmt: skip
        _, of_part, _ = run_fused(alone, config, None)
        torch.testing.assert_close(of_whole["hidden"][part], of_part["hidden"], rtol=1e-12, atol=1e-14)
    assert float(whole.policy) != 0


def _gradient(student: Tensor, teacher: Tensor, labels: Tensor, share: float = 0.0, **settings: Any) -> Tensor:
    """Of one row, by the student's logits."""
    num_classes, hidden = student.shape[1], student.clone().requires_grad_()
    identity, none = torch.eye(num_classes, dtype=student.dtype), torch.zeros(len(labels), dtype=torch.bool)
    config = LossConfig(**ALONE | settings)
    shard = VocabShard(0, num_classes, num_classes)
    heads = Head(hidden, identity), Head(teacher, identity)
    distill_loss(
        *heads, labels, none, None, config, shard, num_tokens=len(labels), num_pairs=0, teacher_share=share
    ).loss.backward()
    assert hidden.grad is not None
    return hidden.grad


def test_tokens_estimate_the_gradient_of_the_reverse_kl() -> None:
    """The mean over all tokens that the student may write, each as often as it does, is the full-vocabulary form."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 1, 7, generator=generator, dtype=torch.float64)
    q = student.softmax(-1)[0]
    mean = sum(q[y] * _gradient(student, teacher, torch.tensor([y])) for y in range(7))
    full = _gradient(student, teacher, torch.tensor([0]), policy=0.0, dac_kl=1.0, divergence="reverse_kl")
    torch.testing.assert_close(mean, full, rtol=1e-10, atol=1e-12)


def test_importance_weights_turn_mixed_text_into_the_students() -> None:
    """The same mean over the mixture, where no weight is clipped."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 1, 7, generator=generator, dtype=torch.float64)
    q, p = student.softmax(-1)[0], teacher.softmax(-1)[0]
    mixture, free = 0.2 * p + 0.8 * q, {"share": 0.2, "policy_clip": 0.999}
    mean = sum(mixture[y] * _gradient(student, teacher, torch.tensor([y]), **free) for y in range(7))
    full = _gradient(student, teacher, torch.tensor([0]), policy=0.0, dac_kl=1.0, divergence="reverse_kl")
    torch.testing.assert_close(mean, full, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("is_teachers", "is_good"), list(itertools.product([True, False], repeat=2)))
def test_the_clip_stops_what_has_gone_far_enough(is_teachers: bool, is_good: bool) -> None:
    """The first token has w = 1.25 where the teacher would not write it, and nearly 0 where only the teacher would."""
    student, teacher = torch.zeros(2, 2, 4, dtype=torch.float64)
    likes, dislikes = (teacher, student) if is_teachers else (student, teacher)
    likes[0, 0], dislikes[0, 0] = 5.0, -5.0
    (teacher if is_good else student)[1, 0] = 3.0
    gradient = _gradient(student, teacher, torch.tensor([0, 0]), 0.2, policy_reward="return")
    assert bool((gradient[0] != 0).any()) == (is_teachers == is_good)


def test_returns_reward_what_comes_later() -> None:
    """The teacher likes the second token alone: the first one is rewarded for it, the last one for nothing."""
    student = torch.zeros(2, 5, dtype=torch.float64)
    teacher = student.clone()
    teacher[1, 3] = 4.0
    labels = torch.tensor([2, 3])
    of_return = _gradient(student, teacher, labels, policy_reward="return")
    assert float(of_return[0, 2]) < -0.1 and float(of_return[1].abs().max()) == 0
    of_token = _gradient(student, teacher, labels)
    assert float(of_token[0].abs().max()) == 0 and float(of_token[1, 3]) < -0.1


def test_an_excluded_class_has_no_reward() -> None:
    top = TeacherTopK(torch.tensor([[0], [1]]), torch.zeros(2, 1), torch.full((2,), -torch.inf))
    student = Head(torch.randn(2, 3), torch.randn(5, 3))
    labels, pairs = torch.tensor([0, 2]), torch.zeros(2, dtype=torch.bool)
    with pytest.raises(DataError, match="loss.policy is infinite where the teacher excludes"):
        distill_loss(
            student, top, labels, pairs, None, LossConfig(**ALONE), VocabShard(0, 5, 5), num_tokens=2, num_pairs=0
        )


def test_sections_that_contradict_themselves() -> None:
    with pytest.raises(ConfigError, match="loss.policy=1 with loss.temperature=2"):
        LossConfig(policy=1, temperature=2)
    with pytest.raises(ConfigError, match="loss.policy_reward=return has no effect with loss.policy=0"):
        LossConfig(policy_reward="return")
    with pytest.raises(ConfigError, match="loss.policy_clip=0.3 has no effect with loss.policy=0"):
        LossConfig(policy_clip=0.3)


ON_POLICY = {"mode": "on_policy", "scrg": {"enabled": False}}


@pytest.mark.parametrize(
    ("generation", "loss", "message"),
    [
        (ON_POLICY, {}, None),
        ({"mode": "teacher_mixed"}, {"policy_clip": 0.3, "policy_reward": "return"}, None),
        (
            {"mode": "teacher_mixed"},
            {"policy_clip": 0.3},
            "loss.policy_clip=0.3 has no effect with loss.policy_reward=t",
        ),
        ({}, {}, "loss.policy=1 with generation.scrg.enabled=true"),
        ({"mode": "off_policy"}, {}, "loss.policy=1 with generation.mode=off_policy"),
        ({"mode": "dataset"}, {}, "loss.policy=1 with generation.mode=dataset"),
        (ON_POLICY | {"top_p": 0.9}, {}, "needs text drawn from whole distributions"),
        (ON_POLICY, {"policy_clip": 0.3}, "loss.policy_clip=0.3 has no effect with generation.mode=on_policy"),
        ({"mode": "teacher_mixed", "sampling_temperature": 0}, {"policy": 0}, "teacher_mixed draws its tokens"),
    ],
)
def test_text_that_the_term_may_be_computed_on(
    generation: dict[str, Any], loss: dict[str, Any], message: str | None
) -> None:
    settings = {
        "run": {"dir": "x"}, "model": {"teacher": {"path": "t"}, "student": {"path": "s"}},
        "generation": generation, "loss": {"policy": 1.0} | loss,
    }  # fmt: skip
    if message is None:
        RunConfig.model_validate(settings)
    else:
        with pytest.raises(ValueError, match=message):
            RunConfig.model_validate(settings)
