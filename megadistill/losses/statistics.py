"""Statistics of logits that are split over the vocabulary (docs/method.md, "Across vocabulary shards").

Suffixes: C tokens of one chunk, Vs this rank's classes, G groups of classes, K merged top classes, R ranks. Values
in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megadistill.losses.tiles import LocalStatistics, LogNormalizers, TileSpec, group_width
from megadistill.parallel.collectives import all_gather_rows
from megadistill.parallel.vocab import VocabShard


@dataclass(frozen=True)
class StudentStatistics:
    """Statistics of the student per token [C], merged and identical on every rank.

    Attributes:
        norms: Normalizers for the kernels.
        label_nats: -log q(label) at temperature 1.
    """

    norms: LogNormalizers
    label_nats: Tensor


@dataclass(frozen=True)
class TokenStatistics(StudentStatistics):
    """With the teacher's.

    Attributes:
        teacher_top1: [C] its top class, the lowest when tied.
        top_log_probs: [C, K] its largest log-probabilities, descending.
        log_tail: [C] log of the sum of all others (a sum, never 1 - sum).
        label_logs: [C] log p(label) and log q(label) at the loss's temperature, float64; None where no term needs them.
    """

    teacher_top1: Tensor
    top_log_probs: Tensor
    log_tail: Tensor
    label_logs: tuple[Tensor, Tensor] | None = None


def merge_student(
    spec: TileSpec, local: LocalStatistics, student_CVs: Tensor, labels: Tensor, shard: VocabShard
) -> StudentStatistics:
    """Statistics of a chunk without a teacher; 3 floats per token in one all-gather over ``shard.group``."""
    gathered = all_gather_rows(torch.stack(student_columns(local, student_CVs, labels, shard), -1), shard.group)
    return merged_student(spec, gathered.unbind(-1))


def student_columns(local: LocalStatistics, student_CVs: Tensor, labels: Tensor, shard: VocabShard) -> list[Tensor]:
    """What a shard sends to the others about the student, each [C]."""
    columns = [local.student_max, local.student_sum, local_target(student_CVs, labels, shard)]
    return columns if local.untempered_sum is None else [*columns, local.untempered_sum]


def merged_student(spec: TileSpec, columns: tuple[Tensor, ...]) -> StudentStatistics:
    """Merges ``student_columns`` of all ranks, each [R, C], in float64."""
    student_max, total, target = (column.double() for column in columns[:3])
    largest = student_max.amax(0)
    log_sum = log_total(student_max, total, largest, spec.temperature)
    untempered_log = log_sum
    if len(columns) > 3:
        untempered_log = log_total(student_max, columns[3].double(), largest, 1.0)
    dtype = columns[0].dtype
    norms = LogNormalizers(largest.to(dtype), log_sum.to(dtype), untempered_log.to(dtype))
    return StudentStatistics(norms, untempered_log + (largest - target.sum(0)))


def label_log_q(spec: TileSpec, columns: tuple[Tensor, ...]) -> Tensor:
    """Log q(label) [C] at the loss's temperature from ``student_columns`` of all ranks, each [R, C], in float64."""
    student_max, total, target = (column.double() for column in columns[:3])
    largest = student_max.amax(0)
    return (target.sum(0) - largest) / spec.temperature - log_total(student_max, total, largest, spec.temperature)


def merge_both(
    spec: TileSpec,
    local: LocalStatistics,
    student_CVs: Tensor,
    teacher_CVs: Tensor,
    labels: Tensor,
    shard: VocabShard,
    top_k: int,
    has_label_p: bool = False,
) -> TokenStatistics:
    """Statistics of a chunk; 6 + K floats per token in one all-gather over ``shard.group``.

    One more when tempered, and one more for the teacher's probability of the label.
    """
    columns = student_columns(local, student_CVs, labels, shard)
    top_CK, tail, top1 = local_top(spec, local, teacher_CVs, shard, min(top_k, shard.total))
    assert local.teacher_max is not None
    num_student = len(columns)
    columns += [local.teacher_max, tail, top1.to(student_CVs.dtype)]
    if has_label_p:
        columns.append(local_target(teacher_CVs, labels, shard))
    gathered = all_gather_rows(torch.cat([torch.stack(columns, -1), top_CK], -1), shard.group)
    num_columns = len(columns)
    student = merged_student(spec, gathered[..., :num_student].unbind(-1))
    teacher_max, tail, top1, *target = gathered[..., num_student:num_columns].unbind(-1)

    largest = teacher_max.double().amax(0)
    tails = tail.double() + (teacher_max.double() - largest) / spec.temperature
    candidates = gathered[..., num_columns:].transpose(0, 1).flatten(1).sort(-1, descending=True)[0].double()
    gaps = (candidates - largest.unsqueeze(-1)) / spec.temperature
    kept = top_CK.shape[-1]
    log_tail = torch.cat([tails.T, gaps[:, kept:]], -1).logsumexp(-1)
    teacher_log = torch.logaddexp(log_tail, gaps[:, :kept].logsumexp(-1))
    logs = None
    if target:
        of_teacher = (target[0].double().sum(0) - largest) / spec.temperature - teacher_log
        logs = of_teacher, label_log_q(spec, gathered[..., :num_student].unbind(-1))
    dtype = student_CVs.dtype
    norms = student.norms._replace(teacher_max=largest.to(dtype), teacher_log=teacher_log.to(dtype))
    return TokenStatistics(
        norms=norms,
        label_nats=student.label_nats,
        teacher_top1=merge_argmax(teacher_max, top1, shard),
        top_log_probs=(gaps[:, :kept] - teacher_log.unsqueeze(-1)).to(dtype),
        log_tail=(log_tail - teacher_log).to(dtype),
        label_logs=logs,
    )


def log_total(maxima: Tensor, totals: Tensor, largest: Tensor, temperature: float) -> Tensor:
    """Log of the sum of all shards' exponentials [C], relative to the largest logit; maxima and totals are [R, C]."""
    return torch.log((totals * ((maxima - largest) / temperature).exp()).sum(0))


def local_top(
    spec: TileSpec, local: LocalStatistics, teacher_CVs: Tensor, shard: VocabShard, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The shard's largest teacher logits and their rest.

    Returns:
        The ``top_k`` largest logits [C, top_k], padded with -inf; the tempered log-sum-exp [C] of all others, relative
        to the maximum; and the top class [C] in the whole vocabulary.
    """
    num_tokens, width = teacher_CVs.shape
    largest = local.teacher_max
    assert largest is not None
    if width == 0:
        top_CK = teacher_CVs.new_full((num_tokens, top_k), -math.inf)
        return top_CK, torch.full_like(largest, -math.inf), torch.full_like(largest, shard.start, dtype=torch.int64)
    top1 = _first_column(local.group_max, largest, teacher_CVs) + shard.start
    if top_k == 0:
        assert local.teacher_sum is not None
        return teacher_CVs[:, :0], local.teacher_sum.log(), top1
    if local.group_max is None or local.group_sum is None:
        candidates, tails = teacher_CVs, teacher_CVs[:, :0]
    else:
        candidates, is_outside = _candidates(local.group_max, teacher_CVs, top_k)
        tails = local.group_sum.log() + (local.group_max - largest.unsqueeze(-1)) / spec.temperature
        tails = tails.masked_fill(~is_outside, -math.inf)
    values, index = candidates.topk(min(top_k, candidates.shape[-1]), -1)
    others = candidates - largest.unsqueeze(-1)
    if spec.temperature != 1.0:
        others /= spec.temperature
    others.scatter_(-1, index, -math.inf)
    filled = F.pad(values, (0, top_k - values.shape[-1]), value=-math.inf)
    log_tail = others.logsumexp(-1) if tails.shape[-1] == 0 else torch.cat([tails, others], -1).logsumexp(-1)
    return filled, log_tail, top1


def _candidates(group_max: Tensor, teacher_CVs: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Logits [C, .] of the groups that hold the top classes, and a mask [C, G] of all other groups."""
    num_tokens, num_classes = teacher_CVs.shape
    width, all_groups = group_width(num_classes), group_max.shape[-1]
    groups = group_max.topk(min(num_groups, all_groups), -1).indices
    is_outside = torch.ones_like(group_max, dtype=torch.bool).scatter_(-1, groups, False)
    if num_classes == all_groups * width and teacher_CVs.is_contiguous():  # whole groups, copied as such
        first = torch.arange(num_tokens, device=groups.device).unsqueeze(-1) * all_groups
        candidates = teacher_CVs.view(-1, width).index_select(0, (first + groups).flatten())
        return candidates.view(num_tokens, groups.shape[1] * width), is_outside
    columns = (groups.unsqueeze(-1) * width + torch.arange(width, device=group_max.device)).flatten(1)
    candidates = teacher_CVs.gather(-1, columns.clamp(max=num_classes - 1))
    return candidates.masked_fill_(columns >= num_classes, -math.inf), is_outside


def _first_column(group_max: Tensor | None, largest: Tensor, teacher_CVs: Tensor) -> Tensor:
    """Column [C] of the first maximum: in the first group that has it, so that ties take the lowest class."""
    if group_max is None:
        return teacher_CVs.argmax(-1)
    width, last = group_width(teacher_CVs.shape[-1]), teacher_CVs.shape[-1] - 1
    group = (group_max == largest.unsqueeze(-1)).to(torch.int32).argmax(-1, keepdim=True)
    columns = (group * width + torch.arange(width, device=teacher_CVs.device)).clamp(max=last)
    is_largest = teacher_CVs.gather(-1, columns) == largest.unsqueeze(-1)
    return columns.gather(-1, is_largest.to(torch.int32).argmax(-1, keepdim=True)).squeeze(-1)


def merge_argmax(largest: Tensor, classes: Tensor, shard: VocabShard) -> Tensor:
    """Class [C] int64 of the overall maximum, the lowest when tied, from local maxima and their classes [R, C]."""
    is_best = largest == largest.amax(0)
    lowest = torch.where(is_best, classes.to(torch.int64), shard.total).amin(0)
    return lowest.clamp_max(shard.total - 1)  # NaN has no best class


def local_target(logits_CVs: Tensor, labels: Tensor, shard: VocabShard) -> Tensor:
    """Logit [C] of the label where this shard holds it, else 0: the sum over the shards is the label's logit."""
    is_here, column = label_columns(labels, shard)
    if shard.size == 0:
        return logits_CVs.new_zeros(labels.shape)
    return torch.where(is_here, logits_CVs.gather(-1, column.unsqueeze(-1)).squeeze(-1), 0.0)


def label_columns(labels: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Whether this shard holds the label, and its column (a valid one in any case)."""
    column = labels - shard.start
    return (column >= 0) & (column < shard.size), column.clamp(0, max(shard.size - 1, 0))
