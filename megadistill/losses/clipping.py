"""DAC-KL of a chunk's rows from the row sums of all shards: its value and its derivatives by the mask's thresholds.

Paper: Eq. 6-8; the definitions are those of docs/method.md, "Token level"; the sums are those of `rowmath.sums`.
p, q: teacher and student probabilities; m: mask; P, Q: kept mass; Rp, Rq: clipped mass of teacher and student.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megadistill.losses.tiles import TileSpec


@dataclass(frozen=True)
class ClipTerms:
    """Per row [C], merged and identical on every rank.

    value: the loss L; kept_mass, clipped_mass: P and Rp; log_norm: log Rq (bucket) or log Q (renormalise);
    d_theta_l, d_theta_u and d_mass_l, d_mass_u: derivatives of L and of Rp by the thresholds, None without edge sums.
    """

    value: Tensor
    kept_mass: Tensor
    clipped_mass: Tensor
    log_norm: Tensor
    d_theta_l: Tensor | None = None
    d_theta_u: Tensor | None = None
    d_mass_l: Tensor | None = None
    d_mass_u: Tensor | None = None


def merge_clip_sums(spec: TileSpec, sums: Tensor) -> ClipTerms:
    """[R, C, num_sums] sums of all shards -> loss value and derivatives of each row."""
    num_linear = 8 if spec.has_edges else 4
    linear = sums[..., :num_linear].sum(0)
    _, kept_gap, kept_p, clipped_p = linear[..., :4].unbind(-1)
    # The student's sums are relative to each shard's largest term: far from the teacher its probabilities underflow,
    # but log Rq and log Q must not.
    shifts, shift = sums[..., num_linear], sums[..., num_linear].amax(0)
    scale = torch.exp(shifts - torch.where(torch.isneginf(shift), 0.0, shift))
    totals = (sums[..., num_linear + 1 :] * scale.unsqueeze(-1)).sum(0)
    total = totals[..., 0]
    log_norm = torch.log(total) + shift
    if spec.remainder == "bucket":
        log_ratio = torch.where(clipped_p > 0, torch.log(clipped_p) - log_norm, 0.0)
        value, factor, divisor = kept_gap + clipped_p * log_ratio, 1 + log_ratio, torch.ones_like(kept_p)
    else:
        mean_gap = kept_gap / kept_p
        value, factor, divisor = mean_gap - torch.log(kept_p) + log_norm, mean_gap + 1, kept_p
    if not spec.has_edges:
        return ClipTerms(value, kept_p, clipped_p, log_norm)
    gap_l, p_l, gap_u, p_u = linear[..., 4:].unbind(-1)
    # Shares of the student's weighted mass at the two edges.
    share_l, share_u = totals[..., 1] / total, totals[..., 2] / total
    if spec.remainder == "bucket":
        share_l, share_u = clipped_p * share_l, clipped_p * share_u
    edge_l, edge_u = (gap_l - factor * p_l) / divisor + share_l, (gap_u - factor * p_u) / divisor + share_u
    softness = spec.softness
    return ClipTerms(
        value, kept_p, clipped_p, log_norm, -edge_l / softness, edge_u / softness, p_l / softness, -p_u / softness
    )
