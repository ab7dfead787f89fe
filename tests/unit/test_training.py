"""Schedule, policy, and the collation of a micro-batch."""

from __future__ import annotations

import pytest
import torch

from megadistill.config.schema import GenerationSection, OptimSection
from megadistill.decoding.batch_plan import DecodeBatchPlan, plan_decode_batches
from megadistill.errors import ConfigError
from megadistill.generation.policy import TextPolicy
from megadistill.generation.replay_buffer import ReplayEntry
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


def policy(mode: str, seed: int = 5, **more: object) -> TextPolicy:
    generation = GenerationSection.model_validate({"mode": mode, **more})
    return TextPolicy(generation, seed=seed, max_steps=2000, global_batch_size=2)


def test_the_policy_is_a_function_of_seed_and_step() -> None:
    draws = [policy("mixed", student_ratio=0.3).source(step) for step in range(2000)]
    assert draws == [policy("mixed", student_ratio=0.3).source(step) for step in range(2000)]
    assert set(draws) == {"generate", "dataset"}
    assert draws.count("generate") / 2000 == pytest.approx(0.3, abs=0.04)
    assert draws != [policy("mixed", seed=6, student_ratio=0.3).source(step) for step in range(2000)]
    for mode, source, phi in (("on_policy", "generate", 1), ("dataset", "dataset", 0), ("teacher", "teacher", 0)):
        assert policy(mode).phi == phi
        assert {policy(mode).source(step) for step in range(50)} == {source}


def test_off_policy_writes_until_the_buffer_is_full_and_less_later_on() -> None:
    off = policy("off_policy", off_policy={"initial_phi": 0.6, "replay_batches": 4})
    assert off.buffer is not None and off.schedule is not None
    sources = []
    for step in range(2000):
        sources.append(off.source(step))
        if sources[-1] == "generate":
            rows = [ReplayEntry(2 * step + i, step, (1,), None, (2,), -1, 0) for i in range(2)]
            off.buffer.append(rows)
    written = [i for i, source in enumerate(sources) if source == "generate"]
    assert "replay" not in sources[: written[3]] and sources.count("dataset") / 2000 == pytest.approx(0.4, abs=0.04)
    assert sources[:500].count("generate") > 3 * sources[1500:].count("generate")
    assert sources[1500:].count("replay") > 3 * sources[:500].count("replay")
    before = off.phi
    off.schedule.observe(1.0)
    off.schedule.observe(2.0)
    assert off.phi == pytest.approx(before + 0.1)


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


def test_waves_are_as_wide_as_the_cache() -> None:
    def plan(max_cache_bytes: int, rows: int = 10) -> DecodeBatchPlan:
        return plan_decode_batches(
            rows_per_rank=rows, columns=5, one_row=4, writer_bytes=2, reader_bytes=8, max_cache_bytes=max_cache_bytes
        )

    assert plan(10 * 50) == DecodeBatchPlan(10, True, 50)
    assert plan(10 * 50 - 1) == DecodeBatchPlan(10, False, 49)  # the teacher's cache goes first
    assert plan(99) == DecodeBatchPlan(5, False, 9)  # nine fit; two waves of five are as many as nine and one
    assert plan(39) == DecodeBatchPlan(3, False, 3) and plan(10) == plan(8) == DecodeBatchPlan(1, False, 1)
    with pytest.raises(ConfigError, match=r"generation.max_cache_bytes=7 is less than one row of 4 tokens .*: 8;"):
        plan(7)
