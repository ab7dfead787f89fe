"""Schedule, policy, and the collation of a micro-batch."""

from __future__ import annotations

import pytest
import torch

from megadistill.config.schema import GenerationSection, OptimSection
from megadistill.generation.policy import student_probability, uses_student_text
from megadistill.training.micro_batch import TrainingRow, build_micro_batch
from megadistill.training.schedule import learning_rate

CPU = torch.device("cpu")


def test_learning_rate() -> None:
    optim = OptimSection(lr=1.0, warmup_steps=4, min_lr_ratio=0.1)
    rates = [learning_rate(optim, step, 24) for step in range(24)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0 and rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False))
    assert learning_rate(OptimSection(lr=1.0, schedule="constant"), 999, 1000) == 1.0
    assert learning_rate(OptimSection(lr=1.0, schedule="linear", min_lr_ratio=0.0), 999, 1000) == 0.0
    assert learning_rate(OptimSection(lr=1.0, warmup_ratio=0.5), 0, 10) == 0.2


def test_the_policy_is_a_function_of_seed_and_step() -> None:
    mixed = GenerationSection(mode="mixed", student_ratio=0.3)
    draws = [uses_student_text(mixed, seed=5, step=step) for step in range(2000)]
    assert draws == [uses_student_text(mixed, seed=5, step=step) for step in range(2000)]
    assert sum(draws) / 2000 == pytest.approx(0.3, abs=0.04)
    assert draws != [uses_student_text(mixed, seed=6, step=step) for step in range(2000)]
    for mode, probability in (("on_policy", 1.0), ("dataset", 0.0)):
        section = GenerationSection(mode=mode)
        assert student_probability(section) == probability
        assert {uses_student_text(section, seed=0, step=step) for step in range(50)} == {bool(probability)}


def test_references_and_student_text_share_a_batch() -> None:
    hidden = [torch.full((2, 3), 1.0), torch.full((3, 3), 2.0)]
    rows = [
        TrainingRow((5, 6), (7, 8, 9), (10, 11), (True, False), hidden[0]),
        TrainingRow((5,), None, (12, 13, 14), (False, True, False), hidden[1]),
    ]
    micro = build_micro_batch(rows, pad_id=0, device=CPU)
    ids, width = micro.batch.input_ids, micro.batch.input_ids.shape[1]
    assert ids.tolist() == [[5, 6, 7, 8, 9], [5, 6, 10, 11, 0], [5, 12, 13, 14, 0]]
    assert micro.sft_labels.tolist() == [7, 8, 9] and micro.sft_index.tolist() == [1, 2, 3]
    assert micro.kd_labels.tolist() == [10, 11, 12, 13, 14]
    assert micro.kd_index.tolist() == [width + 1, width + 2, 2 * width, 2 * width + 1, 2 * width + 2]
    # Row i of the flattened states predicts the token one column on.
    assert [int(ids.flatten()[i + 1]) for i in micro.kd_index.tolist()] == micro.kd_labels.tolist()
    assert micro.pair_mask.tolist() == [True, False, False, True, False]
    assert micro.teacher_hidden is not None and micro.teacher_hidden[:, 0].tolist() == [1, 1, 2, 2, 2]
    assert not micro.is_shared


def test_text_that_is_the_reference_is_read_once() -> None:
    reference = (7, 8)
    rows = [TrainingRow((5,), reference, reference, (True, False), torch.zeros(2, 3)), TrainingRow((5,), None, None)]
    micro = build_micro_batch(rows, pad_id=0, device=CPU)
    assert micro.is_shared and micro.batch.input_ids.tolist() == [[5, 7, 8]]


def test_a_batch_without_any_loss_still_has_a_row() -> None:
    micro = build_micro_batch([TrainingRow((5,), None, None)], pad_id=0, device=CPU)
    assert micro.batch.input_ids.shape == (1, 1) and len(micro.sft_index) == len(micro.kd_index) == 0
