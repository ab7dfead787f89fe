"""One distillation step, top to bottom: the student writes, the teacher corrects, the student writes on; then three
losses, one update (paper, section 3). ``rows`` are this data-parallel rank's share of the global batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megadistill.data.spans import pair_mask_from_span_ids, token_span_ids
from megadistill.generation.policy import SOURCES
from megadistill.generation.scoring import TeacherStates
from megadistill.generation.scrg import NO_ERROR, Revision
from megadistill.observability.timers import Timers
from megadistill.training.components import Components
from megadistill.training.micro_batch import GlobalCounts, MicroBatchLoss, TrainingRow, build_micro_batch
from megadistill.training.schedule import learning_rate
from megadistill.training.texts import BatchRow, Writing, remember, replayed, write_and_revise

_TERMS = ("dac_kl", "span", "kept_mass", "mean_lower", "mean_upper")


@dataclass
class StepResult:
    """What a step leaves behind: the numbers of metrics.jsonl and the texts of samples.jsonl (this rank's rows).

    ``is_updated`` is False where a number was not finite and student and gate stayed as they were (the same on all
    ranks). ``rows`` are what was trained on; after such a step ``finite`` tells of each whether the losses of its
    micro-batch are.
    """

    metrics: dict[str, float]
    is_updated: bool
    rows: Sequence[TrainingRow]
    finite: list[bool]
    samples: list[dict[str, Any]] = field(default_factory=list)


def distillation_step(step: int, rows: Sequence[BatchRow], components: Components) -> StepResult:
    """Runs update ``step`` (0-based) and returns its metrics, equal on all ranks, and this rank's samples."""
    config = components.config
    timers = Timers(torch.cuda.synchronize if components.context.device.type == "cuda" else None)

    # 1. Sequence level: the text to train on. Every rank decides alike.
    source, writing = components.policy.source(step), None
    if source == "generate":
        training_rows, writing = write_and_revise(rows, components, timers)
    elif source == "replay":
        training_rows = replayed(step, components)
    else:
        texts = [components.teacher_text(row.example) if source == "teacher" else row.reference for row in rows]
        training_rows = [
            TrainingRow(row.example.prompt_ids, row.reference, text) for row, text in zip(rows, texts, strict=True)
        ]

    # 2. The teacher reads that text, where it has not while correcting it; spans are found in it.
    if source != "generate":
        with timers("teacher"):
            training_rows = read_by_teacher(training_rows, components)
    with timers("spans"):
        training_rows = find_spans(training_rows, components)

    # 3. Global counts: the only normalisation there is.
    counts = global_counts(training_rows, components)

    # 4. Token, span and reference losses, micro-batch by micro-batch; gradients are summed.
    with timers("train"):
        losses = accumulate_gradients(training_rows, counts, components)

    metrics = collect_metrics(losses, counts, None if writing is None else writing.revision, components)

    # 5. One update of student and gate, unless a number in it is not finite.
    with timers("optimizer"):
        lr = learning_rate(config.optim, step, config.train.max_steps)
        is_finite = math.isfinite(metrics["loss"])
        if components.gate is not None:
            is_finite &= components.gate.reduce(loss_scale=components.context.dp_size)
        is_updated = components.student.step(lr, skip=not is_finite)
        if components.gate is not None:
            components.gate.step(skip=not is_updated)
    if writing is not None and is_updated:
        remember(step, rows, writing, components)

    metrics |= {"lr": lr, "grad_norm": components.student.grad_norm, "phi": components.policy.phi}
    metrics |= {f"text/{name}": float(source == name) for name in SOURCES}
    if components.policy.buffer is not None:
        metrics["replay/rows"] = float(len(components.policy.buffer))
    metrics |= timers.seconds()
    finite = []
    if not is_updated:  # asking every loss waits for the device
        flags = [loss_fn.is_finite for loss_fn in losses]
        finite = [flags[i // config.train.micro_batch_size] for i in range(len(training_rows))]
    return StepResult(metrics, is_updated, training_rows, finite, samples_of(step, rows, writing, components))


def read_by_teacher(rows: Sequence[TrainingRow], components: Components) -> list[TrainingRow]:
    """The teacher's hidden states of text that it has not read while it was corrected."""
    if components.teacher is None:
        return list(rows)
    read = TeacherStates(components.prefiller(), [row.prompt for row in rows], 0, keep=False)
    read.update([row.text or () for row in rows], [0] * len(rows))
    return [
        row if row.text is None else replace(row, teacher_hidden=hidden)
        for row, hidden in zip(rows, read.hidden, strict=True)
    ]


def find_spans(rows: Sequence[TrainingRow], components: Components) -> list[TrainingRow]:
    """Which neighbouring tokens of each text share a phrase (no communication)."""
    if components.teacher is None:
        return list(rows)
    return [
        replace(
            row, pairs=pair_mask_from_span_ids(token_span_ids(row.text, components.tokenizer, components.span_prior))
        )
        if row.text
        else row
        for row in rows
    ]


def global_counts(rows: Sequence[TrainingRow], components: Components) -> GlobalCounts:
    """Tokens and span pairs of the whole step (one all-reduce of three numbers over the data-parallel group)."""
    local = torch.tensor(
        [
            sum(len(row.reference) for row in rows if row.reference is not None),
            sum(len(row.text) for row in rows if row.text is not None),
            sum(sum(row.pairs) for row in rows),
        ],
        dtype=torch.float64,
        device=components.context.device,
    )
    return GlobalCounts(*components.context.sum_over_dp(local).tolist())


def accumulate_gradients(
    rows: Sequence[TrainingRow], counts: GlobalCounts, components: Components
) -> list[MicroBatchLoss]:
    """Forward and backward of every micro-batch; both heads are gathered once for all of them."""
    size, losses = components.config.train.micro_batch_size, []
    gate = components.gate.gate if components.gate is not None else None
    with components.teacher_head() as teacher_head, components.student.head():
        for start in range(0, len(rows), size):
            micro = build_micro_batch(
                rows[start : start + size], pad_id=components.pad_id, device=components.context.device
            )
            loss_fn = MicroBatchLoss(micro, counts, components.loss, gate, components.student.shard, teacher_head)
            batch = micro.batch
            loss = components.student.forward(batch.input_ids, batch.attention_mask, batch.position_ids, loss_fn)
            components.student.backward(loss)
            if start + size < len(rows):
                components.student.end_micro_step()
            losses.append(loss_fn)
    return losses


def collect_metrics(
    losses: Sequence[MicroBatchLoss], counts: GlobalCounts, revision: Revision | None, components: Components
) -> dict[str, float]:
    """Global values from every rank's shares (one all-reduce over the data-parallel group)."""
    outputs = [loss_fn.output for loss_fn in losses if loss_fn.output is not None]
    positions = [p for p in revision.error_positions if p != NO_ERROR] if revision is not None else []
    sums = [
        float(sum(float(loss_fn.sft) for loss_fn in losses if loss_fn.sft is not None)),
        *(float(sum(float(getattr(output, name)) for output in outputs)) for name in _TERMS),
        float(len(positions)),
        float(sum(positions)),
        float(len(revision.error_positions) if revision is not None else 0),
        float(sum(revision.num_corrections) if revision is not None else 0),
    ]
    device = components.context.device
    total = components.context.sum_over_dp(torch.tensor(sums, dtype=torch.float64, device=device)).tolist()
    sft, (dac_kl, span, kept_mass, lower, upper) = total[0], total[1:6]
    num_corrected, position_sum, num_rows, num_corrections = total[6:]
    config = components.loss
    metrics = {
        "loss": config.sft * sft + config.dac_kl * dac_kl + config.span * span,
        "loss/sft": sft,
        "loss/dac_kl": dac_kl,
        "loss/span": span,
        "num_tokens": counts.num_kd if components.teacher is not None else counts.num_sft,
        "num_sft_tokens": counts.num_sft,
        "num_pairs": counts.num_pairs,
        "kept_mass": kept_mass,
        "gate/lower": lower,
        "gate/upper": upper,
    }
    if num_rows:
        metrics |= {
            "scrg/corrected_fraction": num_corrected / num_rows,
            "scrg/no_error_fraction": 1 - num_corrected / num_rows,
            "scrg/corrections_mean": num_corrections / num_rows,
            "scrg/error_position_mean": position_sum / num_corrected if num_corrected else -1.0,
        }
    return metrics


def samples_of(
    step: int, rows: Sequence[BatchRow], writing: Writing | None, components: Components
) -> list[dict[str, Any]]:
    """The first rows of the global batch as text, for samples.jsonl: nothing in them depends on the layout."""
    train = components.config.train
    if writing is None or not train.samples_every or step % train.samples_every:
        return []
    first_id = step * train.global_batch_size
    return [
        {
            "step": step + 1,
            "sequence_id": row.sequence_id,
            "prompt": row.example.prompt,
            "student": components.decode(writing.written.responses[i]),
            "error_position": writing.revision.error_positions[i],
            "corrected": components.decode(writing.revision.rows.responses[i]),
        }
        for i, row in enumerate(rows)
        if row.sequence_id - first_id < train.samples_rows
    ]
