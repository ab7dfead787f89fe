"""The objective written out densely: whole logits of the whole vocabulary, plain autograd, any dtype.

This is docs/method.md as code, in the same order; the fused objective is tested against it. The two share only the
gate's network. Use it to read, to check and for small problems; it keeps several [T, V] tensors and the gradient of
each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megadistill.config.loss import LossConfig
from megadistill.losses.divergences import DIVERGENCES
from megadistill.losses.fused import IGNORE_INDEX
from megadistill.losses.head import Head
from megadistill.losses.output import DistillScalars
from megadistill.losses.topk_teacher import TeacherTopK


@dataclass(frozen=True, kw_only=True)
class ReferenceOutput(DistillScalars):
    """As DistillOutput, with graphs. ``gate_objective`` is what the gate minimizes."""

    loss: Tensor
    gate_objective: Tensor
    kl_map: Tensor
    teacher_top1: Tensor


def reference_loss(
    student: Head,
    teacher: Head | TeacherTopK,
    labels: Tensor,
    pair_mask: Tensor,
    gate: nn.Module | None,
    config: LossConfig,
    *,
    num_tokens: float,
    num_pairs: float,
    token_weights: Tensor | None = None,
) -> ReferenceOutput:
    """As ``distill_loss``, with the whole vocabulary in one process.

    Back-propagate ``loss`` for the student and ``gate_objective`` for the gate.
    """
    is_valid = labels != IGNORE_INDEX
    positions = is_valid.nonzero().squeeze(-1)
    logits_TV = _logits(student)[positions]
    full_log_q = F.log_softmax(logits_TV / config.temperature, -1)
    if isinstance(teacher, TeacherTopK):
        log_p, log_q, full_p = _listed(teacher, positions, full_log_q)
    else:
        log_p, log_q = F.log_softmax(_logits(teacher)[positions].detach() / config.temperature, -1), full_log_q
        full_p = log_p.exp()
    p = log_p.exp()
    weights = log_q.new_ones(len(positions)) if token_weights is None else token_weights[positions]

    def mean(values: Tensor) -> Tensor:
        return (weights * values).sum() / num_tokens

    sft = mean(F.cross_entropy(logits_TV, labels[positions], reduction="none"))
    has_rest = isinstance(teacher, TeacherTopK) and log_p.shape[-1] > teacher.ids.shape[-1]
    num_classes = full_log_q.shape[-1]
    lower, upper, mask, complement = _masks(log_p, gate, config, has_rest, num_classes)
    dac_kl = config.temperature**2 * mean(_token_values(log_p, log_q, mask, complement, config))
    coverage = mean(F.relu((complement * p).sum(-1) - config.coverage_target).square())

    first = _first_of_pairs(pair_mask, is_valid)
    if config.span_relation == "hadamard":
        span_values = _pair_values(full_log_q, full_p, first, config.span_eps)
    else:
        span_values = _written_span_values(log_p, log_q, _label_places(teacher, positions, labels), first, config)
    span = span_values.sum() / num_pairs if num_pairs else 0.0 * logits_TV.sum()

    sign = -1.0 if config.gate_objective == "maximize" else 1.0
    guard = config.coverage_weight * coverage if config.guards else 0.0
    kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).detach()
    return ReferenceOutput(
        loss=config.sft * sft + config.dac_kl * dac_kl + config.span * span,
        gate_objective=sign * config.dac_kl * dac_kl + guard,
        sft=sft,
        dac_kl=dac_kl,
        span=span,
        kept_mass=mean((mask * p).sum(-1)),
        kl_map=kl.new_zeros(len(labels)).index_copy(0, positions, kl),
        teacher_top1=torch.full_like(labels, -1).index_copy(0, positions, full_p.argmax(-1)),
        mean_lower=mean(lower),
        mean_upper=mean(upper),
    )


def _first_of_pairs(pair_mask: Tensor, is_valid: Tensor) -> Tensor:
    """The first token of each span pair, counted among the valid tokens."""
    starts_pair = pair_mask[:-1] & is_valid[:-1] & is_valid[1:]
    return (is_valid.cumsum(0) - 1)[:-1][starts_pair]


def _pair_values(log_q: Tensor, p: Tensor, first: Tensor, eps: float) -> Tensor:
    """The span value of each pair of neighbors (paper, Eq. 10)."""
    difference = (log_q[first] + log_q[first + 1]).exp() - p[first] * p[first + 1]
    return (difference.square().sum(-1) + eps**2).sqrt() - eps


def _label_places(teacher: Head | TeacherTopK, positions: Tensor, labels: Tensor) -> Tensor:
    """The class of each label; of a ``TeacherTopK`` its place in the list, or that of the rest."""
    classes = labels[positions]
    if isinstance(teacher, Head):
        return classes
    is_label = teacher.ids[positions] == classes.unsqueeze(-1)
    return torch.where(is_label.any(-1), is_label.int().argmax(-1), is_label.shape[-1])


def _written_span_values(log_p: Tensor, log_q: Tensor, labels: Tensor, first: Tensor, config: LossConfig) -> Tensor:
    """The value of each span as written, from both models' log-probabilities of its tokens."""
    values, starts = [], set(first.tolist())
    log_p, log_q = (logs.gather(-1, labels.unsqueeze(-1)).squeeze(-1) for logs in (log_p, log_q))
    for start in sorted(starts):
        if start - 1 in starts:
            continue
        end = start + 1
        while end in starts:
            end += 1
        of_teacher, of_student = log_p[start : end + 1].sum(), log_q[start : end + 1].sum()
        if config.span_relation == "joint":
            values.append((of_teacher.exp() - of_student.exp()) ** 2)
        else:
            values.append((of_teacher - of_student) ** 2 / (end + 1 - start))
    return torch.stack(values) if values else log_q[:0]


def quantile_thresholds(
    sorted_log_probs: Tensor, log_tail: Tensor, quantile_logit: Tensor, num_classes: int | None
) -> Tensor:
    """Log-probability at a quantile, token by token: linear between the knots (lambda_j, log p_(j)), slope 1 outside.

    Knots run from the top class (the largest quantile) down.

    Args:
        sorted_log_probs: [T, K] the teacher's largest log-probabilities, descending.
        log_tail: [T] log of the sum of all other probabilities.
        quantile_logit: [T] logits of the quantiles.
        num_classes: V for quantiles of ranks; None for quantiles of mass.
    """
    p = sorted_log_probs.exp()
    num_knots = p.shape[-1]
    thresholds = []
    for t in range(len(p)):
        knots = []
        for j in range(num_knots):
            if num_classes is None:
                above = p[t, :j].sum() + p[t, j] / 2
                below = log_tail[t].exp() + p[t, j + 1 :].sum() + p[t, j] / 2
                knots.append(torch.log(below) - torch.log(above))
            else:
                knots.append(torch.tensor(math.log(num_classes - j - 0.5) - math.log(j + 0.5), dtype=p.dtype))
        point, values = quantile_logit[t], sorted_log_probs[t]
        if point >= knots[0]:
            theta = values[0] + (point - knots[0])
        elif point <= knots[-1]:
            theta = values[-1] + (point - knots[-1])
        else:
            j = next(j for j in range(num_knots - 1) if knots[j + 1] < point)
            share = (point - knots[j + 1]) / (knots[j] - knots[j + 1])
            theta = values[j + 1] + share * (values[j] - values[j + 1])
        thresholds.append(theta)
    return torch.stack(thresholds) if thresholds else quantile_logit


def _logits(head: Head) -> Tensor:
    return F.linear(head.hidden, head.weight, head.bias)


def _listed(teacher: TeacherTopK, positions: Tensor, full_log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log p, log q) over the listed classes and the rest, and p over all classes (0 where not listed)."""
    ids, log_probs, log_tail = teacher.ids[positions], teacher.log_probs[positions], teacher.log_tail[positions]
    full_p = torch.zeros_like(full_log_q).detach().scatter(-1, ids, log_probs.exp())
    if ids.shape[-1] == full_log_q.shape[-1]:  # nothing is left for a rest
        return log_probs, full_log_q.gather(-1, ids), full_p
    log_p = torch.cat([log_probs, log_tail.unsqueeze(-1)], -1)
    rest = full_log_q.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    log_q = torch.cat([full_log_q.gather(-1, ids), rest], -1)
    return log_p, log_q, full_p


def _masks(
    log_p: Tensor, gate: nn.Module | None, config: LossConfig, has_rest: bool, num_classes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantiles l, u [T], the mask m and 1 - m [T, V]; m = 1 without clipping.

    The rest of a TeacherTopK, the last class, is never kept.
    """
    if not config.is_clipped:
        zeros = torch.zeros_like(log_p)
        return zeros[:, 0], zeros[:, 0] + 1, zeros + 1, zeros
    listed = log_p[:, :-1] if has_rest else log_p
    top, index = listed.topk(min(config.top_k, listed.shape[-1]), -1)
    log_tail = log_p.scatter(-1, index, -math.inf).logsumexp(-1)
    if config.clip == "gate":
        assert gate is not None
        lambda_l, lambda_u = gate(top, log_tail)
    else:
        bounds = torch.tensor([config.lower, config.upper], dtype=log_p.dtype)
        lambda_l, lambda_u = (bound.logit().expand(len(log_p)) for bound in bounds)
    counted = None if config.quantile == "mass" else num_classes
    theta_l = quantile_thresholds(top, log_tail, lambda_l.to(log_p.dtype), counted).unsqueeze(-1)
    theta_u = quantile_thresholds(top, log_tail, lambda_u.to(log_p.dtype), counted).unsqueeze(-1)
    lower_edge, upper_edge = (log_p - theta_l) / config.softness, (theta_u - log_p) / config.softness
    mask = torch.sigmoid(lower_edge) * torch.sigmoid(upper_edge)
    complement = torch.sigmoid(-lower_edge) + torch.sigmoid(lower_edge) * torch.sigmoid(-upper_edge)
    is_top = F.one_hot(listed.argmax(-1), log_p.shape[-1]).bool()
    mask, complement = mask.masked_fill(is_top, 1.0), complement.masked_fill(is_top, 0.0)
    if has_rest:
        mask = torch.cat([mask[:, :-1], torch.zeros_like(mask[:, -1:])], -1)
        complement = torch.cat([complement[:, :-1], torch.ones_like(mask[:, -1:])], -1)
    return torch.sigmoid(lambda_l), torch.sigmoid(lambda_u), mask, complement


def _token_values(log_p: Tensor, log_q: Tensor, mask: Tensor, complement: Tensor, config: LossConfig) -> Tensor:
    """The token loss [T], not multiplied by the temperature squared."""
    if config.is_clipped or config.divergence == "dac_kl":
        return _clipped_kl(log_p, log_q, mask, complement, config.remainder)
    divergence = DIVERGENCES[config.divergence]
    return divergence.reference(log_p, log_q, divergence.share(config))


def _clipped_kl(log_p: Tensor, log_q: Tensor, mask: Tensor, complement: Tensor, remainder: str) -> Tensor:
    """DAC-KL [T] of each token."""
    p, q = log_p.exp(), log_q.exp()
    kept = (mask * p * (log_p - log_q)).sum(-1)
    if remainder == "renormalize":
        kept_p, kept_q = (mask * p).sum(-1), (mask * q).sum(-1)
        return kept / kept_p - kept_p.log() + kept_q.log()
    clipped_p, clipped_q = (complement * p).sum(-1), (complement * q).sum(-1)
    is_clipped = (clipped_p > 0) & (clipped_q > 0)
    safe_p, safe_q = torch.where(is_clipped, clipped_p, 1.0), torch.where(is_clipped, clipped_q, 1.0)
    return kept + safe_p * (safe_p.log() - safe_q.log())
