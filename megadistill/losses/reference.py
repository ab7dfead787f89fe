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
from megadistill.losses.reference_thresholds import lower_thresholds, upper_thresholds
from megadistill.losses.topk_teacher import TeacherTopK
from megadistill.parallel.output_head import OutputHead


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
    rows: Tensor | None = None,
    teacher_share: float = 0.0,
    skews: Tensor | None = None,
    ahead: OutputHead | None = None,
    interpolation: float = 1.0,
    temperatures: Tensor | None = None,
) -> ReferenceOutput:
    """As ``distill_loss`` in one process; the student descends ``loss`` and the gate ``gate_objective``."""
    is_valid = labels != IGNORE_INDEX
    positions = is_valid.nonzero().squeeze(-1)
    logits_TV = _logits(student)[positions]
    taus = (logits_TV.new_full(labels.shape, config.temperature) if temperatures is None else temperatures)[positions]
    full_log_q = F.log_softmax(logits_TV / taus.unsqueeze(-1), -1)
    log_p, log_q, full_p = _both(teacher, positions, full_log_q, taus, interpolation)
    p = log_p.exp()
    weights = log_q.new_ones(len(positions)) if token_weights is None else token_weights[positions]

    def mean(values: Tensor) -> Tensor:
        return (weights * values).sum() / num_tokens

    sft = mean(F.cross_entropy(logits_TV, labels[positions], reduction="none"))
    has_rest = isinstance(teacher, TeacherTopK) and log_p.shape[-1] > teacher.ids.shape[-1]
    mask = _masks(log_p, gate, config, has_rest, full_log_q.shape[-1])
    skews = None if skews is None else skews[positions].unsqueeze(-1)
    dac_kl = mean(taus**2 * _token_values(log_p, log_q, mask, config, skews))
    places, first = _label_places(teacher, positions, labels), _first_of_pairs(pair_mask, is_valid)
    span_values = _span_values((log_p, log_q), (full_p, full_log_q), places, first, config)
    span = span_values.sum() / num_pairs if num_pairs else 0.0 * logits_TV.sum()
    policy = mean(_policy_values(log_p, log_q, places, _row_numbers(rows, positions), teacher_share, config))
    after = dac_kl
    if ahead is not None:
        full_ahead = F.log_softmax(_logits(Head.of(student.hidden, ahead))[positions] / config.temperature, -1)
        ahead_log_q = _both(teacher, positions, full_ahead, taus, 1.0)[1]
        after = config.temperature**2 * mean(_token_values(log_p, ahead_log_q, mask, config, None))
    kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).detach()
    return ReferenceOutput(
        loss=config.sft * sft + config.dac_kl * dac_kl + config.span * span + config.policy * policy,
        gate_objective=_gate_objective(config, dac_kl, after, mean(_coverage(mask, p, config))),
        sft=sft,
        dac_kl=dac_kl,
        span=span,
        policy=policy,
        kept_mass=mean(1 - (mask.clipped * p).sum(-1)),
        **{name: mean(values) if config.is_clipped else torch.zeros(()) for name, values in mask.counts.items()},
        kl_map=kl.new_zeros(len(labels)).index_copy(0, positions, kl),
        teacher_top1=torch.full_like(labels, -1).index_copy(0, positions, full_p.argmax(-1)),
        **{name: mean(values) for name, values in mask.quantiles.items()},
    )


def _gate_objective(config: LossConfig, now: Tensor, after: Tensor, coverage: Tensor) -> Tensor:
    """What the gate minimizes: of DAC-KL now and after the virtual step, and the coverage penalty."""
    if config.gate_objective == "student":
        return config.dac_kl * (after - now)
    sign = -1.0 if config.gate_objective == "maximize" else 1.0
    return sign * config.dac_kl * now + (config.coverage_weight * coverage if config.guards else 0.0)


def _both(
    teacher: Head | TeacherTopK, positions: Tensor, full_log_q: Tensor, taus: Tensor, interpolation: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(log p, log q) over the classes that the teacher tells apart, and p over all."""
    if isinstance(teacher, TeacherTopK):
        return _listed(teacher, positions, full_log_q)
    logits = interpolation * _logits(teacher)[positions] / taus.unsqueeze(-1) + (1 - interpolation) * full_log_q
    log_p = F.log_softmax(logits.detach(), -1)
    return log_p, full_log_q, log_p.exp()


@dataclass(frozen=True)
class _Mask:
    """Per token [T] or class [T, V]: m (at the top class 1 + m with remainder=none), 1 - m, quantiles, two flags."""

    kept: Tensor
    clipped: Tensor
    lower: Tensor
    upper: Tensor
    is_all_cut: Tensor
    is_top: Tensor

    @property
    def classes(self) -> Tensor:
        """How many classes are kept, the top class once."""
        own = (self.kept * self.is_top).sum(-1) - 1
        return self.kept.sum(-1) - own.gt(0).to(own.dtype)

    @property
    def quantiles(self) -> dict[str, Tensor]:
        """What is reported of them."""
        return {"mean_lower": self.lower, "square_lower": self.lower.square(), "mean_upper": self.upper}

    @property
    def counts(self) -> dict[str, Tensor]:
        """What is reported of them."""
        return {"classes": self.classes, "few_classes": (self.classes < 1.5).to(self.kept.dtype)}


def _coverage(mask: _Mask, p: Tensor, config: LossConfig) -> Tensor:
    """relu(x - target)^2 [T], x: the clipped mass, or what it is of all that lies beside the top class."""
    clipped = (mask.clipped * p).sum(-1)
    beside = p.masked_fill(mask.is_top, 0.0).sum(-1)
    # The derivative by log l where l is just enough: from there on it would be 0, and the guard would see nothing.
    clipped = clipped + mask.is_all_cut * beside * (mask.lower - mask.lower.detach()) / mask.lower.detach().clamp_min(
        1e-9
    )
    if config.coverage == "relative" and config.is_clipped:
        clipped = torch.where(beside > 0, clipped / torch.where(beside > 0, beside, 1.0), 0.0)
    return F.relu(clipped - config.coverage_target).square()


def _first_of_pairs(pair_mask: Tensor, is_valid: Tensor) -> Tensor:
    """The first token of each span pair, counted among the valid tokens."""
    starts_pair = pair_mask[:-1] & is_valid[:-1] & is_valid[1:]
    return (is_valid.cumsum(0) - 1)[:-1][starts_pair]


def _span_values(
    listed: tuple[Tensor, Tensor], full: tuple[Tensor, Tensor], labels: Tensor, first: Tensor, config: LossConfig
) -> Tensor:
    if config.span_relation == "hadamard":
        p, log_q = full
        return _pair_values(log_q, p, first, config.span_eps)
    return _written_span_values(*listed, labels, first, config)


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


def _row_numbers(rows: Tensor | None, positions: Tensor) -> list[int]:
    return [0] * len(positions) if rows is None else rows[positions].tolist()


def _policy_values(
    log_p: Tensor, log_q: Tensor, labels: Tensor, rows: list[int], teacher_share: float, config: LossConfig
) -> Tensor:
    """-min(w A, clip(w) A) [T] with w = (q / q_old) (q_old / p~): q_old has this value and no gradient."""
    if config.policy == 0:
        return 0.0 * log_q.sum(-1)
    log_p, log_q = (logs.gather(-1, labels.unsqueeze(-1)).squeeze(-1) for logs in (log_p, log_q))
    p, q_old = log_p.exp(), log_q.exp().detach()
    gains = advantages = (log_p - log_q).detach()
    if config.policy_reward == "return":
        later = [[u for u in range(t + 1, len(rows)) if rows[u] == row] for t, row in enumerate(rows)]
        means = [gains[places].mean() if places else gains.new_zeros(()) for places in later]
        advantages = torch.stack(means) if means else gains
    weight = log_q.exp() / (teacher_share * p + (1 - teacher_share) * q_old)
    clipped = weight.clamp(1 - config.policy_clip, 1 + config.policy_clip)
    return -torch.minimum(weight * advantages, clipped * advantages)


def _logits(head: Head) -> Tensor:
    products, logit_map = F.linear(head.hidden, head.weight, head.bias), head.logit_map
    if logit_map.cap is None:
        return logit_map.factor * products
    return logit_map.cap * torch.tanh(logit_map.factor / logit_map.cap * products)


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


def _masks(log_p: Tensor, gate: nn.Module | None, config: LossConfig, has_rest: bool, num_classes: int) -> _Mask:
    """The mask of each token; m = 1 without clipping. The rest of a TeacherTopK, the last class, is never kept."""
    if not config.is_clipped:
        zeros = torch.zeros_like(log_p)
        return _Mask(zeros + 1, zeros, zeros[:, 0], zeros[:, 0] + 1, zeros[:, 0] > 0, zeros > 0)
    listed = log_p[:, :-1] if has_rest else log_p
    top, index = listed.topk(min(config.top_k, listed.shape[-1]), -1)
    log_tail = log_p.scatter(-1, index, -math.inf).logsumexp(-1)
    lambda_l, lambda_u = _quantiles(top, log_tail, gate, config, num_classes)
    s = config.softness
    theta_l, is_all_cut = lower_thresholds(log_p.detach(), lambda_l, s, has_rest, num_classes)
    lower_edge = (log_p - theta_l.unsqueeze(-1)) / s
    upper_edge = torch.full_like(lower_edge, math.inf)
    if lambda_u is not None:
        theta_u = upper_thresholds(log_p.detach(), lambda_u, s, has_rest, num_classes)
        upper_edge = (torch.maximum(theta_u, theta_l.detach()).unsqueeze(-1) - log_p) / s
    mask = torch.sigmoid(lower_edge) * torch.sigmoid(upper_edge)
    complement = torch.sigmoid(-lower_edge) + torch.sigmoid(lower_edge) * torch.sigmoid(-upper_edge)
    if has_rest:
        mask = torch.cat([mask[:, :-1], torch.zeros_like(mask[:, -1:])], -1)
        complement = torch.cat([complement[:, :-1], torch.ones_like(mask[:, -1:])], -1)
    is_top = F.one_hot(listed.argmax(-1), log_p.shape[-1]).bool()
    own = mask.masked_fill(is_top, 0.0) if config.remainder != "none" else mask
    lower, upper = torch.sigmoid(lambda_l), torch.ones_like(lambda_l) if lambda_u is None else torch.sigmoid(lambda_u)
    beside = complement.masked_fill(is_top, 0.0)
    return _Mask(own + is_top, beside, lower, upper, is_all_cut, is_top)


def _quantiles(
    top: Tensor, log_tail: Tensor, gate: nn.Module | None, config: LossConfig, num_classes: int
) -> tuple[Tensor, Tensor | None]:
    """Logits of the quantiles [T]."""
    if config.clip == "gate":
        assert gate is not None
        return gate(top, log_tail)
    bounds = torch.tensor([config.lower, config.upper], dtype=top.dtype).expand(len(top), 2)
    lower, upper = bounds.unbind(-1)
    if config.clip == "entropy":
        tail = log_tail.exp()
        of_tail = torch.where(tail > 0, tail * (log_tail - math.log(max(1, num_classes - top.shape[-1]))), 0.0)
        entropy = -(top.exp() * top).sum(-1) - of_tail
        lower = lower * (entropy / math.log(max(2, num_classes))).clamp(0, 1)
    return lower.logit(), None if config.upper == 1 else upper.logit()


def _token_values(log_p: Tensor, log_q: Tensor, mask: _Mask, config: LossConfig, skews: Tensor | None) -> Tensor:
    """The token loss [T], not multiplied by the temperature squared; ``skews`` [T, 1] are the tokens' own."""
    if config.is_clipped or config.divergence == "dac_kl":
        return _clipped_kl(log_p, log_q, mask.kept, mask.clipped, config.remainder)
    divergence = DIVERGENCES[config.divergence]
    return divergence.reference(log_p, log_q, divergence.share(config) if skews is None else skews)


def _clipped_kl(log_p: Tensor, log_q: Tensor, mask: Tensor, complement: Tensor, remainder: str) -> Tensor:
    """DAC-KL [T] of each token."""
    p, q = log_p.exp(), log_q.exp()
    kept = (mask * p * (log_p - log_q)).sum(-1)
    if remainder == "none":
        return kept
    if remainder == "truncate":
        truncated = mask * p / (mask * p).sum(-1, keepdim=True)
        is_kept = truncated > 0
        log_truncated = torch.where(is_kept, truncated, 1.0).log()
        return torch.where(is_kept, truncated * (log_truncated - log_q), 0.0).sum(-1)
    if remainder == "renormalize":
        kept_p, kept_q = (mask * p).sum(-1), (mask * q).sum(-1)
        return kept / kept_p - kept_p.log() + kept_q.log()
    clipped_p, clipped_q = (complement * p).sum(-1), (complement * q).sum(-1)
    is_clipped = (clipped_p > 0) & (clipped_q > 0)
    safe_p, safe_q = torch.where(is_clipped, clipped_p, 1.0), torch.where(is_clipped, clipped_q, 1.0)
    return kept + safe_p * (safe_p.log() - safe_q.log())
