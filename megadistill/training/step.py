"""One distillation step, top to bottom: samples, counts, gradients, update (paper, section 3).

The student writes, the teacher corrects, the student continues (where the text source does so); then three losses and
one update of student and gate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from megadistill.data.sample import NO_ERROR, Sample
from megadistill.data.spans import pair_mask_from_span_ids, token_span_ids
from megadistill.generation.sources.base import STANDARD_KINDS, TextSource
from megadistill.losses import LossConfig
from megadistill.losses.output import METRIC_NAMES, TERMS
from megadistill.losses.span import written_spans
from megadistill.models.end_tokens import cut_end
from megadistill.observability.timers import Timers
from megadistill.parallel.output_head import OutputHead
from megadistill.training.components import Components
from megadistill.training.focus import focused
from megadistill.training.look_ahead import look_ahead
from megadistill.training.micro_batch import GRADIENT_NAMES, GlobalCounts, MicroBatchLoss, build_micro_batch
from megadistill.training.passes import plan_passes
from megadistill.training.schedule import learning_rate

_OF_THE_MASK = ("kept_mass", "mask/classes", "mask/few_classes", "gate/lower", "gate/lower_square", "gate/upper")


@dataclass
class StepResult:
    """The outcome of a step.

    Attributes:
        metrics: The step's entries in metrics.jsonl, the same on every rank.
        is_updated: Whether student and gate were updated, the same on all ranks; False after a number that is not
            finite.
        samples: What this rank trained on.
        finite: After a step without an update, whether each sample's text and the losses of its micro-batch are finite.
    """

    metrics: dict[str, float]
    is_updated: bool
    samples: Sequence[Sample]
    finite: list[bool] = field(default_factory=list)


def distillation_step(
    step: int, batch: Sequence[Sample], components: Components, timers: Timers | None = None
) -> StepResult:
    """Runs one update.

    Args:
        step: The update, 0-based.
        batch: This data-parallel rank's share of the global batch.
        components: What the run is made of.
        timers: Told of the phases; None: the metrics have their seconds.
    """
    device = components.context.device
    timers = timers or Timers(torch.cuda.synchronize if device.type == "cuda" else None)

    # 1. Sequence level: the responses to train on, the teacher's hidden states of them, and their spans.
    source = components.source.choose(step)
    samples = source.samples(step, batch, timers)
    with timers("spans"):
        samples = find_spans(samples, components)
    if components.focus is not None and components.teacher is not None:
        with timers("score"):
            samples = focused(
                samples, components.focus, student=components.student, teacher=components.teacher,
                loss=components.loss, context=components.context,
                examples_per_pass=components.config.train.micro_batch_size,
            )  # fmt: skip

    # 2. Global counts: the only normalization there is.
    trained = with_loss_texts(samples, components.loss)
    counts = count_tokens(trained, components)

    # 3. Token, span and reference losses, pass by pass, few columns of which are padding; gradients are summed.
    with timers("train"):
        passes = plan_passes(trained, components.config.train, components.context)
        every = components.config.train.diagnose_every
        is_diagnosed = every > 0 and (step + 1) % every == 0
        losses = accumulate_gradients(
            trained, passes, counts, components, is_diagnosed, ahead=look_ahead(samples, components)
        )
    metrics = loss_metrics(losses, samples, counts, components)

    # 4. One update of student and gate, unless a number in it is not finite.
    with timers("optimizer"):
        is_updated = update(step, metrics, components)
    if is_updated:
        components.source.updated(step, samples)
    for schedule in components.schedules:
        metrics |= schedule.metrics()
        if is_updated:
            schedule.updated(step + 1, metrics["loss/dac_kl"])

    metrics |= source_metrics(source, components) | timers.seconds()
    finite = []
    if not is_updated:  # asking every loss waits for the device
        bad = {i for indices, loss in zip(passes, losses, strict=True) if not loss.is_finite for i in indices}
        finite = [i not in bad and sample.is_finite for i, sample in enumerate(samples)]
    return StepResult(metrics, is_updated, samples, finite)


def find_spans(samples: Sequence[Sample], components: Components) -> list[Sample]:
    """Which neighboring tokens of each response share a phrase (no communication); none without a span loss."""
    if components.teacher is None:
        return list(samples)

    ends = components.eos_ids | components.teacher_eos_ids

    def pair_mask(response_ids: tuple[int, ...]) -> Sequence[bool]:
        if components.loss.span == 0:
            return [False] * len(response_ids)
        text = cut_end(response_ids, ends)  # an end token is part of no phrase
        span_ids = token_span_ids(text, components.tokenizer, components.span_prior)
        return pair_mask_from_span_ids([*span_ids, *[-1] * (len(response_ids) - len(text))])

    return [
        replace(sample, pair_mask=pair_mask(sample.response_ids)) if sample.response_ids else sample
        for sample in samples
    ]


def with_loss_texts(samples: Sequence[Sample], loss: LossConfig) -> Sequence[Sample]:
    """The samples with the text of the cross-entropy in place of their references (``loss.sft_text``)."""
    if loss.sft_text == "reference":
        return samples
    return [replace(sample, reference_ids=sample.response_ids) for sample in samples]


def count_tokens(samples: Sequence[Sample], components: Components) -> GlobalCounts:
    """What the whole step has to learn from (one all-reduce of six numbers over the data-parallel group)."""
    responses = [sample.response_ids for sample in samples if sample.response_ids]
    local = torch.tensor(
        [
            sum(sample.num_reference_tokens for sample in samples),
            sum(sample.num_response_tokens for sample in samples),
            sum(sum(sample.pair_mask) for sample in samples),
            sum(len(written_spans(sample.pair_mask)) for sample in samples),
            sum(sample.reference_ids is not None for sample in samples),
            len(responses),
        ],
        dtype=torch.float64,
        device=components.context.device,
    )
    return GlobalCounts(*components.context.sum_over_dp(local).tolist())


def accumulate_gradients(
    samples: Sequence[Sample],
    passes: Sequence[Sequence[int]],
    counts: GlobalCounts,
    components: Components,
    is_diagnosed: bool = False,
    ahead: OutputHead | None = None,
) -> list[MicroBatchLoss]:
    """Forward and backward passes over the samples with these indices; both heads are gathered once for all of them."""
    student, losses = components.student, []
    gate = components.gate.gate if components.gate is not None else None
    with components.heads() as teacher_head:
        for number, indices in enumerate(passes, start=1):
            micro_batch = build_micro_batch(
                [samples[i] for i in indices],
                pad_id=components.pad_id,
                device=components.context.device,
                padding_free=components.config.train.padding_free,
            )
            share, taid = components.config.generation.share_of_teacher, components.interpolation
            t = 1.0 if taid is None else taid.t
            loss_fn = MicroBatchLoss(
                micro_batch, counts, components.loss, gate, teacher_head, is_diagnosed, share, ahead, t
            )
            student.backward(student.forward(micro_batch.batch, loss_fn, is_last=number == len(passes)))
            loss_fn.ahead = None  # as large as the head, and needed no more
            losses.append(loss_fn)
    return losses


def loss_metrics(
    losses: Sequence[MicroBatchLoss], samples: Sequence[Sample], counts: GlobalCounts, components: Components
) -> dict[str, float]:
    """Global values from every rank's shares (one all-reduce over the data-parallel group).

    Args:
        losses: The losses of this rank's micro-batches, after their forward passes.
        samples: This rank's samples.
        counts: What the losses were divided by.
        components: What the run is made of.
    """
    shares = dict.fromkeys(METRIC_NAMES, 0.0)
    for micro_batch_loss in losses:
        for values in (micro_batch_loss.metrics, micro_batch_loss.gradient_squares):
            if values:  # one wait for the device per micro-batch
                for name, value in zip(values, torch.stack(list(values.values())).tolist(), strict=True):
                    shares[name] = shares.get(name, 0.0) + value
    shares |= _correction_counts(samples)
    shares["num_columns"] = float(sum(loss.micro_batch.num_columns for loss in losses))
    shares["num_unpadded"] = float(sum(loss.micro_batch.num_tokens for loss in losses))
    local = torch.tensor(list(shares.values()), dtype=torch.float64, device=components.context.device)
    total = dict(zip(shares, components.context.sum_over_dp(local).tolist(), strict=True))
    config = components.loss
    loss = sum(getattr(config, term) * total[f"loss/{term}"] for term in TERMS)
    if total["num_nonfinite"]:  # text that ended where the student had no distribution: no step to learn from
        loss = math.nan
    metrics = {
        "num_tokens": counts.num_kd if components.teacher is not None else counts.num_sft,
        "num_sft_tokens": counts.num_sft,
        "num_pairs": counts.num_pairs,
        "padding": 1 - total["num_unpadded"] / max(1, total["num_columns"]),
    }
    # Without a mask they would be constants that look like measurements.
    has_mask = components.teacher is not None and config.is_clipped
    absent = (() if has_mask else _OF_THE_MASK) + (() if config.policy > 0 else ("loss/policy",))
    reported = {name: total[name] for name in METRIC_NAMES if name not in absent}
    if has_mask:
        square = reported.pop("gate/lower_square")
        reported["gate/lower_std"] = math.sqrt(max(0.0, square - reported["gate/lower"] ** 2))
        if config.upper == 1:
            del reported["gate/upper"]
    return {"loss": loss} | reported | metrics | _correction_metrics(total) | _gradient_shares(total)


def update(step: int, metrics: dict[str, float], components: Components) -> bool:
    """Updates student and gate, unless a number is not finite.

    Args:
        step: The update, 0-based.
        metrics: ``lr``, ``grad_norm`` and ``epoch`` are added.
        components: What the run is made of.

    Returns:
        Whether there was an update, the same on all ranks.
    """
    student, gate, config = components.student, components.gate, components.config
    lr = learning_rate(config.optim, step, components.length.max_steps)
    is_finite = math.isfinite(metrics["loss"])
    if gate is not None:
        is_finite &= gate.reduce(loss_scale=student.loss_scale)
    is_updated = student.step(lr, skip=not is_finite)
    if gate is not None:
        gate.step(skip=not is_updated)
    metrics |= {"lr": lr, "grad_norm": student.grad_norm, "epoch": components.length.epochs(step + 1)}
    return is_updated


def source_metrics(source: TextSource, components: Components) -> dict[str, float]:
    """Where the text of this step came from, and what the run's source has to report."""
    kinds = {f"text/{kind}": 0.0 for kind in STANDARD_KINDS} | {f"text/{source.kind}": 1.0}
    return {"phi": components.source.student_share} | kinds | components.source.metrics()


def _gradient_shares(total: dict[str, float]) -> dict[str, float]:
    """Norm of each term's derivative by the last hidden states, over the sum of these norms."""
    norms = {name: math.sqrt(total[name]) for name in GRADIENT_NAMES if name in total}
    whole = sum(norms.values())
    return {name: norm / whole if whole else 0.0 for name, norm in norms.items()}


def _correction_counts(samples: Sequence[Sample]) -> dict[str, float]:
    """What SCRG did to the samples that the student wrote in this step."""
    written = [sample for sample in samples if sample.rollout_ids is not None]
    error_positions = [sample.error_position for sample in written if sample.error_position != NO_ERROR]
    return {
        "num_corrected": float(len(error_positions)),
        "position_sum": float(sum(error_positions)),
        "num_written": float(len(written)),
        "num_corrections": float(sum(sample.num_corrections for sample in written)),
        "num_nonfinite": float(sum(not sample.is_finite for sample in samples)),
    }


def _correction_metrics(total: dict[str, float]) -> dict[str, float]:
    num_written, num_corrected = total["num_written"], total["num_corrected"]
    if not num_written:
        return {}
    return {
        "scrg/corrected_fraction": num_corrected / num_written,
        "scrg/no_error_fraction": 1 - num_corrected / num_written,
        "scrg/corrections_mean": total["num_corrections"] / num_written,
        "scrg/error_position_mean": total["position_sum"] / num_corrected if num_corrected else -1.0,
    }
