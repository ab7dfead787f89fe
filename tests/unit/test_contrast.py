"""Mode contrast: two rows a prompt, each with its divergence, skew and weight; what they teach; what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from megadistill.config.schema import RunConfig
from megadistill.data.sample import RowLoss, Sample
from megadistill.decoding.batch_plan import DecodeBatchPlan
from megadistill.generation.sources.base import SourceInputs
from megadistill.generation.sources.contrast import Contrast, adaptive_skew
from megadistill.generation.sources.on_policy import OnPolicy
from megadistill.generation.sources.teacher import TeacherText
from megadistill.losses import Head, LossConfig, label_nats
from megadistill.losses.reference import reference_loss
from megadistill.observability.timers import Timers
from megadistill.parallel import VocabShard
from megadistill.parallel.context import ParallelContext
from megadistill.parallel.output_head import OutputHead
from megadistill.training.micro_batch import GlobalCounts, MicroBatchLoss, build_micro_batch
from megadistill.training.row_parts import row_parts
from tests.unit.test_scrg_rules import EOS, SHARD, Model, V

LOSS = {
    "divergence": "skewed_reverse_kl", "divergence_teacher_text": "skewed_forward_kl", "adaptive_skew": True,
    "student_text_weight": 1.5, "skew": 0.9,
}  # fmt: skip
TEXTS: dict[tuple[int, ...], tuple[int, ...]] = {(2,): (5, 3, EOS), (3,): (4, EOS), (4,): (6, 7, 8, EOS)}


def settings(loss: dict[str, Any], mode: str = "contrast") -> RunConfig:
    return RunConfig.model_validate({
        "run": {"dir": "x"}, "model": {"teacher": {"path": "t"}, "student": {"path": "s"}},
        "generation": {"mode": mode, "max_new_tokens": 6, "scrg": {"enabled": False}}, "loss": loss,
    })  # fmt: skip


def tables() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    student, teacher = 2 * torch.randn(2, V, V, generator=generator, dtype=torch.float64)
    return student, teacher


def rows_of(step: int, **loss: Any) -> tuple[list[Sample], Contrast]:
    """The rows of a step of a run of 10, by models that are tables."""
    student, teacher = tables()
    writer: Any = Model(student)
    reader: Any = Model(teacher)
    inputs = SourceInputs(
        settings(LOSS | loss), ParallelContext.single(), writer, reader, frozenset({EOS}),
        DecodeBatchPlan(3, False, 64), max_steps=10,
    )  # fmt: skip
    source = Contrast(inputs, OnPolicy.build(inputs), TeacherText(TEXTS, reader, 1))
    batch = [Sample(i, prompt, reference_ids=(9, EOS)) for i, prompt in enumerate(TEXTS)]
    return source.samples(step, batch, Timers()), source


def mean_probability(table: Tensor, row: Sample) -> float:
    assert row.response_ids is not None
    log_probs = table.log_softmax(-1)[[row.prompt_ids[0], *row.response_ids[:-1]], list(row.response_ids)]
    return float(log_probs.mean().exp())


def test_every_prompt_has_two_rows() -> None:
    rows, source = rows_of(0)
    assert [row.response_ids for row in rows[:3]] == list(TEXTS.values())
    assert [row.rollout_ids for row in rows] == [None] * 3 + [row.response_ids for row in rows[3:]]
    assert [row.prompt_ids for row in rows] == [*TEXTS, *TEXTS]
    assert [row.reference_ids for row in rows] == [(9, EOS)] * 3 + [None] * 3, "a reference counts once"
    states = [() if row.teacher_hidden is None else row.teacher_hidden for row in rows]
    assert [len(hidden) for hidden in states] == [len(row.response_ids or ()) for row in rows]
    assert (source.student_share, source.kind) == (0.5, "contrast")


def test_skews_follow_the_models_difference() -> None:
    """Against the formula on dense probabilities: the mean is that of each kind of text."""
    rows, source = rows_of(0)
    student, teacher = tables()
    gaps = [mean_probability(teacher, row) - mean_probability(student, row) for row in rows]
    gaps = [*gaps[:3], *(-gap for gap in gaps[3:])]
    expected = []
    for i, gap in enumerate(gaps):
        mean = sum(gaps[3 * (i // 3) : 3 * (i // 3) + 3]) / 3
        expected.append(min(max(1 - (1 - 0.9) * mean / (gap + 1e-5), 0.01), 0.9))
    losses = [row.row_loss for row in rows]
    assert all(loss is not None for loss in losses)
    assert [loss.skew for loss in losses if loss] == pytest.approx(expected, rel=1e-9)
    assert [loss.divergence for loss in losses if loss] == ["skewed_forward_kl"] * 3 + ["skewed_reverse_kl"] * 3
    assert any(0.01 < skew < 0.9 for skew in expected), "one is between the bounds"
    assert source.metrics()["contrast/teacher_skew"] == pytest.approx(sum(expected[:3]) / 3)
    assert source.metrics()["contrast/student_skew"] == pytest.approx(sum(expected[3:]) / 3)


@pytest.mark.parametrize(
    ("gap", "mean", "skew"),
    [(0.2, 0.2, 0.1), (0.4, 0.2, 0.1), (0.1, 0.2, 0.01), (0.19, 0.2, 0.0526), (-0.1, 0.2, 0.1), (-1e-5, 0.2, 0.1)],
)
def test_a_skew_is_clipped(gap: float, mean: float, skew: float) -> None:
    """Rows that are no closer than the average have the setting."""
    assert adaptive_skew(gap, mean, 0.1) == pytest.approx(skew, abs=1e-3)


@pytest.mark.parametrize(("step", "weight"), [(0, 1.0), (1, 1.1), (5, 1.5), (9, 1.5)])
def test_the_weight_of_the_students_text_rises(step: int, weight: float) -> None:
    rows, source = rows_of(step)
    weights = [row.row_loss.weight for row in rows if row.row_loss]
    assert weights == pytest.approx([2 - weight] * 3 + [weight] * 3)
    assert source.metrics()["contrast/student_weight"] == pytest.approx(weight)
    rows, source = rows_of(step, student_text_weight=1.0, adaptive_skew=False, divergence_teacher_text=None)
    assert {row.row_loss for row in rows} == {RowLoss("skewed_reverse_kl")} and not source.metrics()


def test_without_the_token_loss_rows_are_plain() -> None:
    changes = {"dac_kl": 0.0, "adaptive_skew": False, "divergence_teacher_text": None, "student_text_weight": 1.0}
    rows, _ = rows_of(0, **changes)
    assert {row.row_loss for row in rows} == {None} and len(rows) == 6


HIDDEN = 5


def micro_batch_of(order: Sequence[int]) -> Any:
    """Rows of both kinds in some order; hidden states and heads of both models are random."""
    generator = torch.Generator().manual_seed(7)
    kinds = [("skewed_forward_kl", 0.03, 0.7), ("skewed_reverse_kl", 0.1, 1.3), ("skewed_forward_kl", 0.1, 0.7),
             ("skewed_reverse_kl", 0.05, 1.3)]  # fmt: skip
    lengths = [3, 2, 4, 1]
    samples = []
    for i, (kind, length) in enumerate(zip(kinds, lengths, strict=True)):
        hidden = torch.randn(length, HIDDEN, generator=generator, dtype=torch.float64)
        labels = tuple(torch.randint(0, V, (length,), generator=generator).tolist())
        pairs = [True] * (length - 1) + [False]
        reference = (4, 5) if i % 2 == 0 else None
        samples.append(
            Sample(i, (7, 8), reference_ids=reference, response_ids=labels, teacher_hidden=hidden, pair_mask=pairs,
                   row_loss=RowLoss(*kind))
        )  # fmt: skip
    return [samples[i] for i in order]


@pytest.mark.parametrize("average", ["token", "row"])
def test_a_micro_batch_equals_the_reference(average: Literal["token", "row"]) -> None:
    """Value and gradients, row by row in float64, in any order of the rows, with references and spans."""
    generator = torch.Generator().manual_seed(9)
    weight, teacher = torch.randn(2, V, HIDDEN, generator=generator, dtype=torch.float64)
    config = LossConfig(sft=0.5, dac_kl=1.5, span=0.3, average=average, temperature=2.0, divergence="skewed_reverse_kl")
    counts = GlobalCounts(5.0, 11.0, 6.0, 3.0, 3.0, 5.0)  # of more than these rows
    for order in ([0, 1, 2, 3], [3, 0, 2, 1], [1, 3], [0]):
        samples = micro_batch_of(order)
        micro = build_micro_batch(samples, pad_id=0, device=torch.device("cpu"), padding_free=True)
        states = torch.randn(1, micro.num_columns, HIDDEN, generator=generator, dtype=torch.float64)
        results = []
        for is_ours in (True, False):
            hidden, own = states.clone().requires_grad_(), weight.clone().requires_grad_()
            if is_ours:
                head = OutputHead(own, None, SHARD)
                loss = MicroBatchLoss(micro, counts, config, None, OutputHead(teacher, None, SHARD))(hidden, head)
            else:
                loss = _by_rows(samples, micro, hidden, own, teacher, counts, config)
            results.append((loss.detach(), *torch.autograd.grad(loss, [hidden, own])))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def _by_rows(
    samples: Sequence[Sample], micro: Any, hidden: Tensor, weight: Tensor, teacher: Tensor, counts: GlobalCounts,
    config: LossConfig,
) -> Tensor:  # fmt: skip
    """The same by the dense reference, one row after the other."""
    flat, total, start = hidden.flatten(0, 1), torch.zeros((), dtype=torch.float64), 0
    for sample in samples:
        assert sample.row_loss is not None and sample.response_ids and sample.teacher_hidden is not None
        length, own = len(sample.response_ids), sample.row_loss
        part = slice(start, start + length)
        factor = own.weight / length if config.average == "row" else own.weight
        output = reference_loss(
            Head(flat[micro.kd_index[part]], weight), Head(sample.teacher_hidden, teacher), micro.kd_labels[part],
            torch.tensor(sample.pair_mask), None, config.replace(divergence=own.divergence, sft=0.0),
            num_tokens=counts.of_responses(config), num_pairs=counts.num_pairs,
            token_weights=torch.full((length,), factor, dtype=torch.float64),
            skews=torch.full((length,), own.skew or 0.0, dtype=torch.float64),
        )  # fmt: skip
        total, start = total + output.loss, start + length
    nats = -(flat[micro.sft_index] @ weight.T).log_softmax(-1)[range(len(micro.sft_labels)), micro.sft_labels]
    lengths = torch.tensor(micro.sft_lengths, dtype=torch.int64)
    means = torch.ones(len(nats)) if config.average == "token" else (1 / lengths.double()).repeat_interleave(lengths)
    return total + config.sft * (nats * means).sum() / counts.of_references(config)


def test_the_student_is_drawn_to_one_text_and_pushed_off_the_other() -> None:
    """One small step: the teacher's token gains, the student's own, which the teacher hardly writes, loses."""
    student, teacher = torch.zeros(2, 2, V, dtype=torch.float64)
    teacher[:, 3], student[:, 6] = 4.0, 4.0
    for divergence, label in (("skewed_forward_kl", 3), ("skewed_reverse_kl", 6)):
        hidden = student.clone().requires_grad_()
        identity = torch.eye(V, dtype=torch.float64)
        output = reference_loss(
            Head(hidden, identity), Head(teacher, identity), torch.full((2,), label), torch.zeros(2, dtype=torch.bool),
            None, LossConfig(sft=0.0, span=0.0).replace(divergence=divergence), num_tokens=2, num_pairs=0,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(output.loss, hidden)
        change = (student - 0.1 * gradient).softmax(-1)[:, label] - student.softmax(-1)[:, label]
        assert bool((change > 1e-4).all() if label == 3 else (change < -1e-4).all())


def test_label_nats() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(9, 4, generator=generator), torch.randn(13, 4, generator=generator)
    labels, bias = torch.arange(9), torch.randn(13, generator=generator)
    expected = -(hidden @ weight.T + bias).double().log_softmax(-1)[range(9), labels]
    for chunk in (2, "auto"):
        found = label_nats(Head(hidden, weight, bias), labels, VocabShard(0, 13, 13), chunk_tokens=chunk)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "loss", "message"),
    [
        ("contrast", LOSS, None),
        ("contrast", {"divergence": "forward_kl"}, None),
        ("contrast", {}, None),
        ("on_policy", {"adaptive_skew": True}, "loss.adaptive_skew=true has no effect with generation.mode=on_policy"),
        ("teacher", {"student_text_weight": 1.5}, "student_text_weight=1.5 has no effect with generation.mode"),
        ("mixed", {"divergence_teacher_text": "forward_kl"}, "divergence_teacher_text=forward_kl has no effect"),
        ("contrast", {"student_text_weight": 1.5, "dac_kl": 0}, "student_text_weight=1.5 has no effect with"),
        ("contrast", {"adaptive_skew": True}, "adaptive_skew=true needs skewed divergences on both texts"),
        ("contrast", LOSS | {"divergence": "forward_kl"}, "not loss.divergence=forward_kl and skewed_forward"),
        ("contrast", {"divergence_teacher_text": "forward_kl"}, "the mask of dac_kl is for both texts or for none"),
        ("contrast", LOSS | {"skew": 0.001}, "loss.adaptive_skew=true with loss.skew=0.001"),
        ("contrast", {"policy": 1.0}, "loss.policy=1 with generation.mode=contrast"),
    ],
)  # fmt: skip
def test_what_fits_together(mode: str, loss: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert settings(loss, mode).loss.divergence == loss.get("divergence", "dac_kl")
    else:
        with pytest.raises(ValueError, match=message):
            settings(loss, mode)


def test_rows_without_tokens_take_part() -> None:
    config, device = LossConfig(average="row"), torch.device("cpu")
    (plain,) = row_parts([2, 0], [None, None], config, device)
    assert plain.tokens is None and plain.weights is not None and plain.weights.tolist() == [0.5, 0.5]
    first, second = row_parts([0, 2], [RowLoss("forward_kl"), RowLoss("reverse_kl", None, 3.0)], config, device)
    assert first.tokens is not None and len(first.tokens) == 0 and first.skews is None
    assert second.weights is not None and second.weights.tolist() == [1.5, 1.5]
    assert (first.config.divergence, second.config.divergence) == ("forward_kl", "reverse_kl")
    assert [part.tokens for part in row_parts([], [], config, device)] == [None]


def test_rows_of_a_shared_text_are_not_added_up_twice() -> None:
    """loss.sft_text=text: references are the responses, and the cross-entropy knows no weight of a row."""
    samples = [replace(sample, reference_ids=sample.response_ids) for sample in micro_batch_of([0, 1])]
    micro = build_micro_batch(samples, pad_id=0, device=torch.device("cpu"), padding_free=True)
    generator = torch.Generator().manual_seed(2)
    weight, teacher = torch.randn(2, V, HIDDEN, generator=generator, dtype=torch.float64)
    hidden = torch.randn(1, micro.num_columns, HIDDEN, generator=generator, dtype=torch.float64)
    counts, config = GlobalCounts(5.0, 5.0, 0.0), LossConfig(span=0.0, divergence="skewed_reverse_kl")
    losses = [
        MicroBatchLoss(micro, counts, config.replace(sft=sft, dac_kl=kl), None, OutputHead(teacher, None, SHARD))(
            hidden, OutputHead(weight, None, SHARD)
        )
        for sft, kl in itertools.product((0.0, 1.0), repeat=2)
        if sft or kl
    ]
    only_kl, only_sft, both = losses
    assert float(both) == pytest.approx(float(only_kl + only_sft), rel=1e-12)
