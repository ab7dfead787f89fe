"""Schedule, text sources, and the collation of a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast, get_args

import pytest
import torch

from megadistill.config.optim import OptimSection
from megadistill.config.schema import GenerationSection, RunConfig
from megadistill.data.encode import TokenizedExample
from megadistill.data.sample import Sample
from megadistill.decoding.batch_plan import DecodeBatchPlan, plan_decode_batches
from megadistill.errors import ConfigError, DataError
from megadistill.generation.sources import source_class
from megadistill.generation.sources.base import SourceInputs, TextSource
from megadistill.generation.sources.by_row import ByRow
from megadistill.generation.sources.off_policy import OffPolicy
from megadistill.generation.sources.replay import Replay
from megadistill.losses import LossConfig
from megadistill.observability.timers import Timers
from megadistill.parallel.context import ParallelContext
from megadistill.training.micro_batch import build_micro_batch
from megadistill.training.row_parts import row_weights
from megadistill.training.schedule import learning_rate
from megadistill.training.step import with_loss_texts

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


def config_of(mode: str, seed: int = 5, **more: Any) -> RunConfig:
    return RunConfig.model_validate({
        "run": {"dir": "x", "seed": seed}, "model": {"teacher": {"path": "t"}, "student": {"path": "s"}},
        "generation": {"mode": mode, **more},
        "train": {"max_steps": 2000, "global_batch_size": 2, "micro_batch_size": 1},
    })  # fmt: skip


def source_of(mode: str, seed: int = 5, **more: Any) -> TextSource:
    config = config_of(mode, seed, **more)
    model: Any = object()
    inputs = SourceInputs(
        config, ParallelContext.single(), model, model, frozenset(), DecodeBatchPlan(2, True, 2), max_steps=2000
    )
    return source_class(config).build(inputs)


def test_every_mode_has_a_source() -> None:
    for mode in get_args(GenerationSection.model_fields["mode"].annotation):
        assert issubclass(source_class(config_of(mode)), TextSource)


def test_the_choice_is_a_function_of_seed_and_step() -> None:
    def draws(**more: Any) -> list[str]:
        source = source_of("mixed", student_ratio=0.3, **more)
        return [source.choose(step).kind for step in range(2000)]

    assert draws() == draws() != draws(seed=6)
    assert set(draws()) == {"generate", "dataset"}
    assert draws().count("generate") / 2000 == pytest.approx(0.3, abs=0.04)
    for mode, kind, share in (("on_policy", "generate", 1), ("dataset", "dataset", 0)):
        source = source_of(mode)
        assert source.student_share == share
        assert {source.choose(step).kind for step in range(50)} == {kind}


def test_off_policy_writes_until_the_buffer_is_full_and_less_later_on() -> None:
    off = source_of("off_policy", off_policy={"initial_phi": 0.6, "replay_batches": 4})
    kinds = []
    for step in range(2000):
        kinds.append(off.choose(step).kind)
        written = (2,) if kinds[-1] == "generate" else None
        off.updated(step, [Sample(2 * step + i, (1,), response_ids=(2,), rollout_ids=written) for i in range(2)])
    written_at = [i for i, kind in enumerate(kinds) if kind == "generate"]
    assert "replay" not in kinds[: written_at[3]] and kinds.count("dataset") / 2000 == pytest.approx(0.4, abs=0.04)
    assert kinds[:500].count("generate") > 3 * kinds[1500:].count("generate")
    assert kinds[1500:].count("replay") > 3 * kinds[:500].count("replay")
    assert off.metrics() == {"replay/rows": 8.0}
    before = off.student_share
    off.observe({"eval/nll": 1.0})
    off.observe({"eval/rouge_l": 1.0})
    off.observe({"eval/nll": 2.0})
    assert off.student_share == pytest.approx(before + 0.1)


def test_off_policy_continues_from_its_state() -> None:
    more: dict[str, Any] = {"off_policy": {"initial_phi": 1.0, "replay_batches": 1}}
    off, again = source_of("off_policy", **more), source_of("off_policy", **more)
    off.observe({"eval/nll": 1.0})
    off.updated(0, [Sample(i, (1,), response_ids=(2, i), rollout_ids=(3,)) for i in range(2)])
    again.load_state_dict(off.state_dict() | {"gate": {}})
    assert again.student_share == off.student_share and again.metrics() == off.metrics()
    again.load_state_dict({"gate": {}})  # a checkpoint of another mode: nothing to continue from
    replayed = [source._replay.buffer.draw(0, 0, stream=1) for source in (off, again) if isinstance(source, OffPolicy)]
    assert replayed[0] == replayed[1]


@pytest.mark.parametrize(
    ("mode", "more", "message"),
    [
        ("on_policy", {"loss": {"dac_kl": 0, "span": 0}}, "no loss would be computed on its text"),
        ("teacher", {"loss": {"dac_kl": 0, "span": 0}}, "no loss would be computed on its text"),
        ("off_policy", {}, "would never use student text"),
    ],
)
def test_a_source_refuses_settings_without_effect(mode: str, more: dict[str, Any], message: str) -> None:
    config = RunConfig.model_validate(config_of(mode).model_dump() | more)
    with pytest.raises(ConfigError, match=message):
        source_class(config).check(config)


def test_plain_sft_is_the_references_alone() -> None:
    config = RunConfig.model_validate(config_of("dataset").model_dump() | {"loss": {"dac_kl": 0, "span": 0}})
    source_class(config).check(config)
    assert not config.needs_teacher


@pytest.mark.parametrize("mode", ["dataset", "mixed", "off_policy"])
def test_a_source_refuses_examples_that_it_cannot_use(mode: str) -> None:
    config = config_of(mode)
    without = [TokenizedExample(0, (1,), None, (), "p")]
    with pytest.raises(DataError, match=f"no row has a reference, and generation.mode={mode}"):
        source_class(config).check_examples(config, without, [])
    source_class(config_of("on_policy")).check_examples(config_of("on_policy"), without, [])


class _Writer(TextSource):
    """Stands for a source: writes token 9, or gives the references."""

    def __init__(self, is_student: bool) -> None:
        self.is_student, self.asked = is_student, []

    def samples(self, step: int, batch: Sequence[Sample], timers: Timers) -> list[Sample]:
        self.asked.append([sample.sequence_id for sample in batch if self.is_student or sample.reference_ids])
        if self.is_student:
            return [replace(sample, response_ids=(9,), rollout_ids=(9,)) for sample in batch]
        return [replace(sample, response_ids=sample.reference_ids) for sample in batch]


def by_row(ratio: float, largest: int = 0) -> tuple[ByRow, _Writer, _Writer]:
    """The source on a rank of a grid in which another one needs ``largest`` rows of student text."""

    class Context:
        device = CPU

        def max_over_world(self, number: torch.Tensor) -> torch.Tensor:
            return number.clamp_min(largest)

    student, dataset, context = _Writer(True), _Writer(False), Context()
    return ByRow(student, dataset, cast(Any, context), ratio, 5), student, dataset


def test_rows_without_a_reference_take_student_text() -> None:
    batch = [Sample(0, (5,), "", (6,)), Sample(1, (5,)), Sample(2, (5,), "", (7,)), Sample(3, (5,))]
    source, student, dataset = by_row(0.0)
    samples = source.samples(0, batch, Timers())
    assert [sample.response_ids for sample in samples] == [(6,), (9,), (7,), (9,)]
    assert [sample.sequence_id for sample in samples] == [0, 1, 2, 3]
    assert [sample.reference_ids for sample in samples] == [(6,), None, (7,), None]
    assert student.asked == [[1, 3]] and dataset.asked == [[0, 2]]
    # Another rank writes three rows: so does this one, and only two of them are used.
    source, student, dataset = by_row(0.0, largest=3)
    assert source.samples(0, batch, Timers()) == samples and student.asked == [[1, 3, 0]]
    # No rank writes anything.
    source, student, dataset = by_row(0.0)
    source.samples(0, [batch[0], batch[2]], Timers())
    assert student.asked == []


def test_each_row_may_choose_its_text() -> None:
    batch = [Sample(i, (5,), "", (6,)) for i in range(2000)]
    samples = by_row(0.3)[0].samples(0, batch, Timers())
    written = {sample.sequence_id for sample in samples if sample.rollout_ids is not None}
    assert len(written) / 2000 == pytest.approx(0.3, abs=0.03)
    assert all(sample.reference_ids == (6,) for sample in samples)
    # A row's choice is its own, whatever the rank holds beside it.
    some = by_row(0.3, largest=50)[0].samples(7, batch[1::4], Timers())
    assert {s.sequence_id for s in some if s.rollout_ids is not None} == {i for i in written if i % 4 == 1}
    source = source_of("mixed", student_ratio=0.3, mixed_by="row")
    assert {source.choose(step).kind for step in range(50)} == {"mixed"} and source.student_share == 0.3


def test_dataset_steps_of_off_policy_leave_the_buffer_alone() -> None:
    """Even where every row of a rank had to be written."""
    off = source_of("off_policy", off_policy={"initial_phi": 0.0, "replay_batches": 1}, scrg={"enabled": False})
    off.updated(0, [Sample(i, (1,), response_ids=(2,), rollout_ids=(2,)) for i in range(2)])
    assert off.metrics() == {"replay/rows": 0.0}


def test_cross_entropy_on_the_text() -> None:
    rows = [Sample(0, (5,), "", (7, 8), (9, 9, 9)), Sample(1, (5,), "", None, (4,)), Sample(2, (5,), "", (7,))]
    texts = with_loss_texts(rows, LossConfig(sft_text="text"))
    micro = build_micro_batch(texts, pad_id=0, device=CPU)
    assert micro.sft_labels.tolist() == [9, 9, 9, 4] and [s.num_reference_tokens for s in texts] == [3, 1, 0]
    assert micro.sft_lengths == (3, 1)
    assert row_weights(micro.sft_lengths, CPU).tolist() == pytest.approx([1 / 3] * 3 + [1])
    assert with_loss_texts(rows, LossConfig()) is rows
    config = RunConfig.model_validate(
        config_of("teacher").model_dump() | {"loss": {"dac_kl": 0, "span": 0, "sft_text": "text"}}
    )
    source_class(config).check(config)
    assert config.needs_teacher, "it writes the text"
    config = config.model_copy(update={"generation": config_of("dataset").generation})
    with pytest.raises(ConfigError, match="loss.sft_text=text with generation.mode=dataset: its text is"):
        source_class(config).check(config)


def test_replayed_text_is_read_by_the_teacher_again() -> None:
    class Teacher:
        keeps_cache = False

        def prefiller(self, examples_per_pass: int) -> Teacher:
            return self

        def read(self, chunks: Sequence[Any], state: object = None) -> list[torch.Tensor]:
            return [torch.tensor(chunk.tokens).unsqueeze(-1) for chunk in chunks]

    config, teacher = config_of("off_policy"), Teacher()
    inputs = SourceInputs(
        config, ParallelContext.single(), teacher, teacher, frozenset(), DecodeBatchPlan(2, True, 2), max_steps=2000
    )
    replay = Replay.build(inputs)
    replay.buffer.append([Sample(i, (5, 6), response_ids=(7, 8 + i), rollout_ids=(7,)) for i in range(2)])
    for i, sample in enumerate(replay.samples(9, [], Timers())):
        assert sample.response_ids == (7, 8 + i) and sample.rollout_ids is None
        assert sample.teacher_hidden is not None and sample.teacher_hidden.flatten().tolist() == [6, 7]


def test_references_and_student_text_share_a_batch() -> None:
    hidden = [torch.full((2, 3), 1.0), torch.full((3, 3), 2.0)]
    rows = [
        Sample(0, (5, 6), "", (7, 8, 9), (10, 11), None, hidden[0], (True, False)),
        Sample(1, (5,), "", None, (12, 13, 14), None, hidden[1], (False, True, False)),
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
    rows = [Sample(0, (5,), "", reference, reference, None, torch.zeros(2, 3), (True, False)), Sample(1, (5,))]
    micro = build_micro_batch(rows, pad_id=0, device=CPU)
    assert micro.is_shared and micro.batch.input_ids.tolist() == [[5, 7, 8]]


def test_a_batch_without_any_loss_still_has_a_row() -> None:
    targets = Sample(0, (5, 6, 7, 8), "", (9, 4), targets=((1, 3),))
    micro = build_micro_batch([targets, Sample(1, (5, 6), "", (7,))], pad_id=0, device=CPU)
    assert micro.sft_lengths == (4, 1)
    assert targets.num_reference_tokens == 4
    # Columns 0 and 1 predict the earlier turn (6, 7), columns 3 and 4 the reference.
    assert micro.sft_labels.tolist() == [6, 7, 9, 4, 7] and micro.sft_index.tolist() == [0, 1, 3, 4, 7]
    micro = build_micro_batch([Sample(0, (5,))], pad_id=0, device=CPU)
    assert micro.batch.input_ids.shape == (1, 1) and len(micro.sft_index) == len(micro.kd_index) == 0


def test_decode_batches_are_as_wide_as_the_cache() -> None:
    def plan(max_cache_bytes: int, rows: int = 10) -> DecodeBatchPlan:
        return plan_decode_batches(
            examples_per_rank=rows,
            columns=5,
            example_columns=4,
            decoder_bytes=2,
            prefiller_bytes=8,
            max_cache_bytes=max_cache_bytes,
        )

    assert plan(10 * 50) == DecodeBatchPlan(10, True, 50)
    assert plan(10 * 50 - 1) == DecodeBatchPlan(10, False, 49)  # the teacher's cache goes first
    assert plan(99) == DecodeBatchPlan(5, False, 9)  # nine fit; two batches of five are as many as nine and one
    assert plan(39) == DecodeBatchPlan(3, False, 3) and plan(10) == plan(8) == DecodeBatchPlan(1, False, 1)
    with pytest.raises(ConfigError, match=r"cache of 7 bytes .* 4 tokens needs 8"):
        plan(7)
