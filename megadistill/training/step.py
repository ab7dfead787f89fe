"""One distillation step, top to bottom: the student writes, the teacher corrects, the student writes on; then three
losses, one update (paper, section 3). ``rows`` are this data-parallel rank's share of the global batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megadistill.data.spans import pair_mask_from_span_ids, token_span_ids
from megadistill.data.tokenize import TokenizedExample
from megadistill.generation.policy import STREAM_CONTINUATION, STREAM_ROLLOUT, student_probability, uses_student_text
from megadistill.generation.protocols import Rows, Sampling
from megadistill.generation.rollout import rollout
from megadistill.generation.scoring import score_rows
from megadistill.generation.scrg import NO_ERROR, Revision, revise
from megadistill.observability.timers import Timers
from megadistill.training.micro_batch import Counts, Objective, TrainingRow, build_micro_batch
from megadistill.training.parts import Parts
from megadistill.training.schedule import learning_rate

_TERMS = ("dac_kl", "span", "kept_mass", "mean_lower", "mean_upper")


@dataclass(frozen=True)
class BatchRow:
    """A prompt of the step: its global sequence id, its tokens, and whether its reference may be used."""

    sequence_id: int
    example: TokenizedExample
    reference: tuple[int, ...] | None


@dataclass
class StepResult:
    """What a step leaves behind: the numbers of metrics.jsonl and the texts of samples.jsonl (this rank's rows)."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]] = field(default_factory=list)


def distillation_step(step: int, rows: Sequence[BatchRow], parts: Parts) -> StepResult:
    """Runs update ``step`` (0-based) and returns its metrics, equal on all ranks, and this rank's samples."""
    config = parts.config
    timers = Timers(torch.cuda.synchronize if parts.context.device.type == "cuda" else None)

    # 1. Sequence level: the text to train on.
    if uses_student_text(config.generation, seed=config.run.seed, step=step):
        written, revision = write_and_revise(rows, parts, timers)
        texts: list[tuple[int, ...] | None] = list(revision.rows.responses)
    else:
        written, revision = None, None
        texts = [row.reference for row in rows]

    # 2. The teacher reads that text once; spans are found in it.
    with timers("teacher"):
        training_rows = read_by_teacher(rows, texts, parts)

    # 3. Global counts: the only normalisation there is.
    counts = global_counts(training_rows, parts)

    # 4. Token, span and reference losses, micro-batch by micro-batch; gradients are summed.
    with timers("train"):
        objectives = accumulate_gradients(training_rows, counts, parts)

    # 5. One update of student and gate.
    with timers("optimizer"):
        lr = learning_rate(config.optim, step, config.train.max_steps)
        parts.student.step(lr)
        if parts.gate is not None:
            parts.gate.step(loss_scale=parts.context.dp_size)

    metrics = collect_metrics(objectives, counts, revision, parts)
    metrics |= {"lr": lr, "grad_norm": parts.student.grad_norm, "phi": student_probability(config.generation)}
    metrics |= timers.seconds()
    return StepResult(metrics, samples_of(step, rows, written, revision, parts))


def write_and_revise(rows: Sequence[BatchRow], parts: Parts, timers: Timers) -> tuple[Rows, Revision]:
    """SCRG (paper, Eq. 3-4). Student parameters are gathered once for rollout, scoring and re-generation."""
    generation, student, teacher = parts.config.generation, parts.student, parts.teacher
    assert teacher is not None
    empty = Rows(tuple(r.sequence_id for r in rows), tuple(r.example.prompt_ids for r in rows), ((),) * len(rows))
    limit_of = {r.sequence_id: parts.response_limit(len(r.example.prompt_ids)) for r in rows}
    sampling = Sampling(
        parts.config.run.seed, generation.sampling_temperature, top_k=generation.top_k, top_p=generation.top_p
    )
    with student.writer() as writer:

        def write(part: Rows, stream: int) -> Rows:
            limits = [limit_of[sequence_id] for sequence_id in part.sequence_ids]
            with timers("rollout" if stream == STREAM_ROLLOUT else "regenerate"):
                return rollout(
                    writer,
                    part,
                    limits=limits,
                    eos_ids=parts.eos_ids,
                    pad_id=parts.pad_id,
                    sampling=sampling,
                    stream=stream,
                )

        def score(part: Rows, round_index: int) -> Any:
            with timers("score"):
                return score_rows(
                    part,
                    student_hidden=parts.response_hidden(writer.hidden, part),
                    student_head=writer.head,
                    teacher_hidden=parts.response_hidden(teacher.hidden, part),
                    teacher_head=teacher.head,
                    shard=student.shard,
                    seed=parts.config.run.seed,
                    round_index=round_index,
                    sample_teacher=generation.scrg.teacher_token == "sample",
                    backend=parts.loss.backend,
                )

        written = write(empty, STREAM_ROLLOUT)
        if not generation.scrg.enabled:
            return written, Revision(written, (NO_ERROR,) * len(rows), (0,) * len(rows))
        revision = revise(
            written,
            score=score,
            write_on=lambda part, round_index: write(part, STREAM_CONTINUATION + round_index),
            rounds=generation.scrg.rounds,
        )
    return written, revision


def read_by_teacher(
    rows: Sequence[BatchRow], texts: Sequence[tuple[int, ...] | None], parts: Parts
) -> list[TrainingRow]:
    """Teacher hidden states and span pairs of the training text. Rows without text are read as empty ones: under ZeRO-3
    every rank makes the same number of forward passes."""
    if parts.teacher is None:
        return [TrainingRow(row.example.prompt_ids, row.reference, None) for row in rows]
    read = Rows(
        tuple(row.sequence_id for row in rows),
        tuple(row.example.prompt_ids for row in rows),
        tuple(text or () for text in texts),
    )
    hidden = parts.response_hidden(parts.teacher.hidden, read)
    return [
        TrainingRow(
            row.example.prompt_ids,
            row.reference,
            text,
            pair_mask_from_span_ids(token_span_ids(text, parts.tokenizer, parts.span_prior)) if text else (),
            states if text is not None else None,
        )
        for row, text, states in zip(rows, texts, hidden, strict=True)
    ]


def global_counts(rows: Sequence[TrainingRow], parts: Parts) -> Counts:
    """Tokens and span pairs of the whole step (one all-reduce of three numbers over the data-parallel group)."""
    local = torch.tensor(
        [
            sum(len(row.reference) for row in rows if row.reference is not None),
            sum(len(row.text) for row in rows if row.text is not None),
            sum(sum(row.pairs) for row in rows),
        ],
        dtype=torch.float64,
        device=parts.context.device,
    )
    return Counts(*parts.context.sum_over_dp(local).tolist())


def accumulate_gradients(rows: Sequence[TrainingRow], counts: Counts, parts: Parts) -> list[Objective]:
    """Forward and backward of every micro-batch; both heads are gathered once for all of them."""
    size, objectives = parts.config.train.micro_batch_size, []
    gate = parts.gate.gate if parts.gate is not None else None
    with parts.teacher_head() as teacher_head, parts.student.head():
        for start in range(0, len(rows), size):
            micro = build_micro_batch(rows[start : start + size], pad_id=parts.pad_id, device=parts.context.device)
            objective = Objective(micro, counts, parts.loss, gate, parts.student.shard, teacher_head)
            batch = micro.batch
            loss = parts.student.forward(batch.input_ids, batch.attention_mask, batch.position_ids, objective)
            parts.student.backward(loss)
            if start + size < len(rows):
                parts.student.end_micro_step()
            objectives.append(objective)
    return objectives


def collect_metrics(
    objectives: Sequence[Objective], counts: Counts, revision: Revision | None, parts: Parts
) -> dict[str, float]:
    """Global values from every rank's shares (one all-reduce over the data-parallel group)."""
    outputs = [objective.output for objective in objectives if objective.output is not None]
    positions = [p for p in revision.error_positions if p != NO_ERROR] if revision is not None else []
    sums = [
        float(sum(float(objective.sft) for objective in objectives if objective.sft is not None)),
        *(float(sum(float(getattr(output, name)) for output in outputs)) for name in _TERMS),
        float(len(positions)),
        float(sum(positions)),
        float(len(revision.error_positions) if revision is not None else 0),
        float(sum(revision.num_corrections) if revision is not None else 0),
    ]
    device = parts.context.device
    total = parts.context.sum_over_dp(torch.tensor(sums, dtype=torch.float64, device=device)).tolist()
    sft, (dac_kl, span, kept_mass, lower, upper) = total[0], total[1:6]
    num_corrected, position_sum, num_rows, num_corrections = total[6:]
    config = parts.loss
    metrics = {
        "loss": config.sft * sft + config.dac_kl * dac_kl + config.span * span,
        "loss/sft": sft,
        "loss/dac_kl": dac_kl,
        "loss/span": span,
        "num_tokens": counts.num_kd if parts.teacher is not None else counts.num_sft,
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
    step: int, rows: Sequence[BatchRow], written: Rows | None, revision: Revision | None, parts: Parts
) -> list[dict[str, Any]]:
    """The first rows of the global batch as text, for samples.jsonl: nothing in them depends on the layout."""
    train = parts.config.train
    if written is None or revision is None or not train.samples_every or step % train.samples_every:
        return []
    first_id = step * train.global_batch_size
    return [
        {
            "step": step + 1,
            "sequence_id": row.sequence_id,
            "prompt": row.example.prompt,
            "student": parts.decode(written.responses[i]),
            "error_position": revision.error_positions[i],
            "corrected": parts.decode(revision.rows.responses[i]),
        }
        for i, row in enumerate(rows)
        if row.sequence_id - first_id < train.samples_rows
    ]
