"""DAC-KL on one chunk: the soft quantile mask, its row sums across shards, its value and its gradients.

Paper: Eq. 6-8; the definitions are those of docs/method.md, "Token level". Suffixes: C rows, V this rank's classes.
p, q: teacher and student probabilities; m: mask; P, Q: kept mass; Rp, Rq: clipped mass of teacher and student.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megadistill.losses.config import Remainder

# Columns of the row sums: these are added over the shards, the four after them merge like a log-sum-exp.
_NUM_LINEAR = 8
_THETA_LIMIT = 1e4  # nats; keeps inf - inf out of the mask


@dataclass(frozen=True)
class ClipMask:
    """[C, V] tiles of the mask m = sigmoid((log p - theta_l)/s) sigmoid((theta_u - log p)/s), 1 at the top class.

    `log_weight` is log(1 - m) (bucket) or log m (renormalise), each formed directly. kept_l and kept_u are m times the
    complement of one edge: s * dm/dtheta up to sign. ratio_l, ratio_u: the same over the weight, never above 1.
    """

    kept: Tensor
    clipped: Tensor
    log_weight: Tensor
    kept_l: Tensor
    kept_u: Tensor
    ratio_l: Tensor
    ratio_u: Tensor


@dataclass(frozen=True)
class ClipTerms:
    """Per row [C], merged and identical on every rank.

    value: the loss L; kl: the unclipped KL; kept_mass, clipped_mass: P and Rp; d_theta_l, d_theta_u and
    d_mass_l, d_mass_u: derivatives of L and of Rp by the thresholds; log_norm: log Rq (bucket) or log Q (renormalise).
    """

    value: Tensor
    kl: Tensor
    kept_mass: Tensor
    clipped_mass: Tensor
    d_theta_l: Tensor
    d_theta_u: Tensor
    d_mass_l: Tensor
    d_mass_u: Tensor
    log_norm: Tensor


def clip_mask(
    log_p_CV: Tensor, theta_l: Tensor, theta_u: Tensor, top_column: Tensor, softness: float, remainder: Remainder
) -> ClipMask:
    """Mask tiles; top_column [C] is the teacher's top class as a column of this shard, outside it when elsewhere."""
    lower = (log_p_CV - theta_l.clamp(-_THETA_LIMIT, _THETA_LIMIT).unsqueeze(-1)) / softness
    upper = (theta_u.clamp(-_THETA_LIMIT, _THETA_LIMIT).unsqueeze(-1) - log_p_CV) / softness
    columns = torch.arange(log_p_CV.shape[-1], device=log_p_CV.device)
    is_top = columns == top_column.unsqueeze(-1)
    below = torch.sigmoid(-lower).masked_fill_(is_top, 0.0)
    above = torch.sigmoid(-upper).masked_fill_(is_top, 0.0)
    kept = (torch.sigmoid(lower) * torch.sigmoid(upper)).masked_fill_(is_top, 1.0)
    clipped = below + above - below * above
    kept_l, kept_u = kept * below, kept * above
    if remainder == "bucket":
        log_weight = torch.log(clipped)
        ratio_l, ratio_u = (torch.where(clipped > 0, edge / clipped, 0.0) for edge in (kept_l, kept_u))
    else:
        log_weight = (F.logsigmoid(lower) + F.logsigmoid(upper)).masked_fill_(is_top, 0.0)
        ratio_l, ratio_u = below, above
    return ClipMask(kept, clipped, log_weight, kept_l, kept_u, ratio_l, ratio_u)


def clip_sums(log_p_CV: Tensor, log_q_CV: Tensor, mask: ClipMask) -> Tensor:
    """[C, 12] local row sums.

    The student's sums are kept relative to their largest term: far from the teacher its probabilities underflow, but
    log Rq and log Q must not.
    """
    p = log_p_CV.exp()
    p_gap = p * (log_p_CV - log_q_CV)
    linear = [p_gap, mask.kept * p_gap, mask.kept * p, mask.clipped * p]
    linear += [mask.kept_l * p_gap, mask.kept_l * p, mask.kept_u * p_gap, mask.kept_u * p]
    exponent = mask.log_weight + log_q_CV
    shift = F.pad(exponent, (0, 1), value=-math.inf).amax(-1) if exponent.shape[-1] == 0 else exponent.amax(-1)
    weighted_q = torch.exp(exponent - _finite(shift).unsqueeze(-1))
    relative = [weighted_q, mask.ratio_l * weighted_q, mask.ratio_u * weighted_q]
    return torch.stack([term.sum(-1) for term in linear] + [shift] + [term.sum(-1) for term in relative], -1)


def merge_clip_sums(sums: Tensor, remainder: Remainder, softness: float) -> ClipTerms:
    """[tp, C, 12] sums of all shards -> loss value and derivatives of each row."""
    kl, kept_gap, kept_p, clipped_p, gap_l, p_l, gap_u, p_u = sums[..., :_NUM_LINEAR].sum(0).unbind(-1)
    shift = sums[..., _NUM_LINEAR].amax(0)
    scale = torch.exp(sums[..., _NUM_LINEAR] - _finite(shift))
    total, total_l, total_u = (sums[..., _NUM_LINEAR + 1 :] * scale.unsqueeze(-1)).sum(0).unbind(-1)
    log_norm = torch.log(total) + _finite(shift)
    # Shares of the student's weighted mass at the two edges; where nothing is clipped there is no edge either.
    share_l, share_u = torch.where(total > 0, total_l / total, 0.0), torch.where(total > 0, total_u / total, 0.0)
    if remainder == "bucket":
        log_ratio = torch.where(clipped_p > 0, torch.log(clipped_p) - log_norm, 0.0)
        value = kept_gap + clipped_p * log_ratio
        edge_l = gap_l - (1 + log_ratio) * p_l + clipped_p * share_l
        edge_u = gap_u - (1 + log_ratio) * p_u + clipped_p * share_u
    else:
        mean_gap = kept_gap / kept_p
        value = mean_gap - torch.log(kept_p) + log_norm
        edge_l = (gap_l - (mean_gap + 1) * p_l) / kept_p + share_l
        edge_u = (gap_u - (mean_gap + 1) * p_u) / kept_p + share_u
    return ClipTerms(
        value=value,
        kl=kl,
        kept_mass=kept_p,
        clipped_mass=clipped_p,
        d_theta_l=-edge_l / softness,
        d_theta_u=edge_u / softness,
        d_mass_l=p_l / softness,
        d_mass_u=-p_u / softness,
        log_norm=log_norm,
    )


def clip_gradient(log_p_CV: Tensor, log_q_CV: Tensor, mask: ClipMask, terms: ClipTerms, remainder: Remainder) -> Tensor:
    """[C, V] derivative of the value by the tempered student logits; q is softmax(student) throughout."""
    share_CV = torch.exp(mask.log_weight + log_q_CV - _finite(terms.log_norm).unsqueeze(-1))
    kept_p_CV = mask.kept * log_p_CV.exp()
    if remainder == "bucket":
        return log_q_CV.exp() - kept_p_CV - terms.clipped_mass.unsqueeze(-1) * share_CV
    return share_CV - kept_p_CV / terms.kept_mass.unsqueeze(-1)


def _finite(shift: Tensor) -> Tensor:
    """0 where a log-sum is empty: its terms are exp(-inf) = 0 whatever the shift."""
    return torch.where(torch.isneginf(shift), 0.0, shift)
