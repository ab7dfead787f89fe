"""DAC-KL of a chunk's tokens from the sums of all shards: its value and its derivatives by the mask's thresholds.

Paper: Eq. 6-8; the definitions are those of docs/method.md, "Token level"; the sums are those of ``ClippedSum``.
p, q: teacher and student probabilities; m: mask; P, Q: kept mass; Rp, Rq: clipped mass of teacher and student.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megadistill.losses.tiles import ClippedSum, TileSpec


@dataclass(frozen=True)
class ClipTerms:
    """Terms of DAC-KL per token [C], merged and identical on every rank.

    Attributes:
        value: The loss L, in nats.
        kept_mass: P.
        clipped_mass: Rp.
        log_norm: log Rq (bucket) or log Q (renormalize).
        d_theta_l: Derivative of L by the lower threshold; None without edge sums, like the next ones.
        d_theta_u: Derivative of L by the upper threshold.
        d_mass_l: Derivative of Rp by the lower threshold.
        d_mass_u: Derivative of Rp by the upper threshold.
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
    """Loss value and derivatives of each token from the sums [R, C, num_sums] of all shards."""
    kept_gap, kept_p, clipped_p = (
        sums[..., column].sum(0) for column in (ClippedSum.KEPT_GAP, ClippedSum.KEPT_P, ClippedSum.CLIPPED_P)
    )
    # The student's sums are relative to each shard's largest term: far from the teacher its probabilities underflow,
    # but log Rq and log Q must not.
    shifts, shift = sums[..., ClippedSum.SHIFT], sums[..., ClippedSum.SHIFT].amax(0)
    scale = torch.exp(shifts - torch.where(torch.isneginf(shift), 0.0, shift))
    total = (sums[..., ClippedSum.TOTAL] * scale).sum(0)
    log_norm = torch.log(total) + shift
    if spec.remainder == "bucket":
        log_ratio = torch.where(clipped_p > 0, torch.log(clipped_p) - log_norm, 0.0)
        value, factor, divisor = kept_gap + clipped_p * log_ratio, 1 + log_ratio, torch.ones_like(kept_p)
    else:
        mean_gap = kept_gap / kept_p
        value, factor, divisor = mean_gap - torch.log(kept_p) + log_norm, mean_gap + 1, kept_p
    terms = ClipTerms(value, kept_p, clipped_p, log_norm)
    if not spec.has_edges:
        return terms

    def edge(gap: ClippedSum, p: ClippedSum, moving: ClippedSum) -> tuple[Tensor, Tensor]:
        """Derivatives of L and of Rp by an edge, up to its sign and the softness."""
        # The part of the student's weighted mass that moves with the edge.
        share = (sums[..., moving] * scale).sum(0) / total
        if spec.remainder == "bucket":
            share = clipped_p * share
        edge_gap, edge_p = sums[..., gap].sum(0), sums[..., p].sum(0)
        return (edge_gap - factor * edge_p) / divisor + share, edge_p

    edge_l, p_l = edge(ClippedSum.GAP_L, ClippedSum.P_L, ClippedSum.TOTAL_L)
    edge_u, p_u = edge(ClippedSum.GAP_U, ClippedSum.P_U, ClippedSum.TOTAL_U)
    softness = spec.softness
    return replace(
        terms,
        d_theta_l=-edge_l / softness,
        d_theta_u=edge_u / softness,
        d_mass_l=p_l / softness,
        d_mass_u=-p_u / softness,
    )
