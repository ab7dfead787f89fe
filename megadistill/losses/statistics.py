"""Row statistics of logits that are split over the vocabulary (docs/method.md, "Across vocabulary shards").

Suffixes: C rows of one chunk, V this rank's classes, K merged top classes. Values in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megadistill.parallel.collectives import all_gather_rows
from megadistill.parallel.vocab import VocabShard


@dataclass(frozen=True)
class RowStatistics:
    """Per row [C] (top_log_probs [C, K]), merged over the shards and identical on every rank.

    student_lse, teacher_lse: log-sum-exp of the tempered logits; student_lse_plain and target_logit belong to the
    student at temperature 1. top_log_probs are the teacher's largest log-probabilities, descending; log_tail is the
    log of the sum of all others (a sum, never 1 - sum). teacher_top1: class of the largest teacher logit, ties lowest.
    """

    student_lse: Tensor
    student_lse_plain: Tensor
    target_logit: Tensor
    teacher_lse: Tensor
    teacher_top1: Tensor
    top_log_probs: Tensor
    log_tail: Tensor


def row_statistics(
    student_CV: Tensor, plain_CV: Tensor, teacher_CV: Tensor, labels: Tensor, shard: VocabShard, top_k: int
) -> RowStatistics:
    """Statistics of one chunk; communicates 6 + K floats a row in one all-gather over `shard.group`.

    student_CV, teacher_CV: tempered logits; plain_CV: the student's at temperature 1 (the same tensor when that is the
    temperature). labels: [C] classes, all valid. teacher_CV is written to and restored.
    """
    largest, top1 = local_argmax(teacher_CV, shard)
    top_CK, tail = _split_top(teacher_CV, min(top_k, shard.total))
    student_lse = torch.logsumexp(student_CV, -1)
    plain_lse = student_lse if plain_CV is student_CV else torch.logsumexp(plain_CV, -1)
    target = local_target(plain_CV, labels, shard)
    columns = torch.stack([student_lse, plain_lse, target, tail, largest, top1.to(student_CV.dtype)], -1)
    gathered = all_gather_rows(torch.cat([columns, top_CK], -1), shard.group)
    student_lse, plain_lse, target, tail, largest, top1 = gathered[..., :6].unbind(-1)

    candidates = gathered[..., 6:].transpose(0, 1).flatten(1).sort(-1, descending=True)[0]
    kept = top_CK.shape[-1]
    log_tail = torch.logsumexp(torch.cat([tail.T, candidates[:, kept:]], -1), -1)
    teacher_lse = torch.logaddexp(log_tail, torch.logsumexp(candidates[:, :kept], -1))
    return RowStatistics(
        student_lse=torch.logsumexp(student_lse, 0),
        student_lse_plain=torch.logsumexp(plain_lse, 0),
        target_logit=target.sum(0),
        teacher_lse=teacher_lse,
        teacher_top1=merge_argmax(largest, top1, shard),
        top_log_probs=candidates[:, :kept] - teacher_lse.unsqueeze(-1),
        log_tail=log_tail - teacher_lse,
    )


def local_argmax(logits_CV: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Largest logit [C] of this shard and its class [C] in the whole vocabulary; the lowest class when tied."""
    if shard.size == 0:
        nothing = logits_CV.new_full((logits_CV.shape[0],), -math.inf)
        return nothing, torch.full_like(nothing, shard.start, dtype=torch.int64)
    index = logits_CV.argmax(-1, keepdim=True)
    return logits_CV.gather(-1, index).squeeze(-1), index.squeeze(-1) + shard.start


def merge_argmax(largest: Tensor, classes: Tensor, shard: VocabShard) -> Tensor:
    """[tp, C] results of `local_argmax` -> [C] int64 class of the overall maximum; the lowest class when tied."""
    is_best = largest == largest.amax(0)
    lowest = torch.where(is_best, classes.to(torch.int64), shard.total).amin(0)
    return lowest.clamp_max(shard.total - 1)  # a row of NaN has no best class


def local_target(logits_CV: Tensor, labels: Tensor, shard: VocabShard) -> Tensor:
    """[C] logit of the label where this shard holds it, else 0: the sum over the shards is the label's logit."""
    is_here, column = label_columns(labels, shard)
    if shard.size == 0:
        return logits_CV.new_zeros(labels.shape)
    return torch.where(is_here, logits_CV.gather(-1, column.unsqueeze(-1)).squeeze(-1), 0.0)


def label_columns(labels: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Whether this shard holds the label, and its column (a valid one in any case)."""
    column = labels - shard.start
    return (column >= 0) & (column < shard.size), column.clamp(0, max(shard.size - 1, 0))


def _split_top(logits_CV: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The `top_k` largest logits [C, top_k], filled up with -inf, and the log-sum-exp [C] of all others."""
    if top_k == 0:
        return logits_CV[:, :0], torch.logsumexp(logits_CV, -1)
    width = logits_CV.shape[-1]
    values, index = logits_CV.topk(min(top_k, width), -1)
    # In place and back: a masked copy of the tile would be as large as the tile.
    logits_CV.scatter_(-1, index, -math.inf)
    tail = torch.logsumexp(logits_CV, -1)
    logits_CV.scatter_(-1, index, values)
    return F.pad(values, (0, top_k - values.shape[-1]), value=-math.inf), tail
