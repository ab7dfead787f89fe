"""DAC-KL of a chunk's tokens from the sums of all shards: its value and its derivatives by the mask's quantiles.

Paper: Eq. 6-8; the definitions are those of docs/method.md, "Token level"; the sums are those of ``ClippedSum``.
p, q: teacher and student probabilities; m: mask; P, Q: kept mass; Rp, Rq: clipped mass of teacher and student.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megadistill.losses.quantile import Thresholds
from megadistill.losses.tiles import UPPER_EDGE, ClippedSum, TileSpec


@dataclass(frozen=True)
class ClipTerms:
    """Terms of DAC-KL per token [C], merged and identical on every rank.

    Attributes:
        value: The loss L, in nats.
        kept_mass: Teacher probability that is kept, P; the top class counts once.
        clipped_mass: Rp.
        classes: Sum of the mask over the classes.
        weights: Factors of (q, m p, bucket) in the derivative by the logits; None: no such part.
        log_norm: log Rq (bucket) or log Q (renormalize).
    """

    value: Tensor
    kept_mass: Tensor
    clipped_mass: Tensor
    classes: Tensor
    weights: tuple[Tensor | None, Tensor, Tensor | None]
    log_norm: Tensor | None = None


@dataclass(frozen=True)
class QuantileDerivatives:
    """Derivatives [C] of L and of Rp by the quantiles l and u; None for u without an upper edge.

    Where a quantile does not move its threshold, they are 0, but for one: where all that lies beside the top class is
    clipped, that of Rp by log l is taken at the l that would do (ours), or a guard would not see the token.
    """

    value_l: Tensor
    mass_l: Tensor
    value_u: Tensor | None = None
    mass_u: Tensor | None = None


class MergedClip:
    """The sums [R, C, num_sums] of all shards, added up by name.

    Args:
        spec: Which sums they are.
        sums: The sums.
    """

    def __init__(self, spec: TileSpec, sums: Tensor) -> None:
        self.spec, self._sums = spec, sums
        self._scale = None
        if spec.has_totals:
            # The student's sums are relative to each shard's largest term: far from the teacher its probabilities
            # underflow, but log Rq and log Q must not.
            shifts = self._column(ClippedSum.SHIFT)
            self._shift = shifts.amax(0)
            self._scale = torch.exp(shifts - torch.where(torch.isneginf(self._shift), 0.0, self._shift))

    def terms(self) -> ClipTerms:
        """Loss value of each token, and the factors of its derivative by the student's logits."""
        gap, kept, clipped = (self[ClippedSum.KEPT_GAP], self[ClippedSum.KEPT_P], self[ClippedSum.CLIPPED_P])
        classes, remainder = self[ClippedSum.CLASSES], self.spec.remainder
        one = torch.ones_like(kept)
        if remainder == "none":
            return ClipTerms(gap, 1 - clipped, clipped, classes - 1, (kept, one, None))
        if remainder == "truncate":
            return ClipTerms(gap / kept - torch.log(kept), kept, clipped, classes, (one, 1 / kept, None))
        log_norm = self._log_norm()
        if remainder == "bucket":
            value = gap + clipped * self._log_ratio()
            return ClipTerms(value, kept, clipped, classes, (one, one, -clipped), log_norm)
        value = gap / kept - torch.log(kept) + log_norm
        return ClipTerms(value, kept, clipped, classes, (None, 1 / kept, one), log_norm)

    def derivatives(self, thresholds: Thresholds, log_top: Tensor) -> QuantileDerivatives:
        """Derivatives by the quantiles, through the thresholds (implicit function theorem).

        A quantile is the mass beyond its threshold, so dl = F'(theta_l) dtheta_l, and the density F' is a sum like the
        others. Softness and signs cancel.

        Args:
            thresholds: Where the edges are.
            log_top: [C] log-probability of the top class.
        """
        has_upper = self.spec.has_upper
        density = self[ClippedSum.DENSITY_L if has_upper else ClippedSum.P_L]
        value_l = -self._edge(ClippedSum.GAP_L, ClippedSum.P_L, ClippedSum.TOTAL_L) / density
        mass_l = self[ClippedSum.P_L] / density
        value_l = torch.where(thresholds.moves_l & (density > 0), value_l, 0.0)
        mass_l = torch.where(thresholds.moves_l & (density > 0), mass_l, 0.0)
        mass_l = torch.where(thresholds.is_all_cut, thresholds.cut_share, mass_l)
        if not has_upper:
            return QuantileDerivatives(value_l, mass_l)
        share = torch.sigmoid((log_top - thresholds.theta_u) / self.spec.softness + UPPER_EDGE)
        density = self[ClippedSum.DENSITY_U] + log_top.exp() * share * (1 - share)
        moves = thresholds.moves_u & (density > 0)
        value_u = self._edge(ClippedSum.GAP_U, ClippedSum.P_U, ClippedSum.TOTAL_U) / density
        mass_u = -self[ClippedSum.P_U] / density
        return QuantileDerivatives(value_l, mass_l, torch.where(moves, value_u, 0.0), torch.where(moves, mass_u, 0.0))

    def __getitem__(self, column: ClippedSum) -> Tensor:
        part = self._column(column)
        is_total = column in (ClippedSum.TOTAL, ClippedSum.TOTAL_L, ClippedSum.TOTAL_U)
        return (part * self._scale).sum(0) if is_total and self._scale is not None else part.sum(0)

    def _column(self, column: ClippedSum) -> Tensor:
        return self._sums[..., self.spec.columns.index(column)]

    def _log_norm(self) -> Tensor:
        return torch.log(self[ClippedSum.TOTAL]) + self._shift

    def _log_ratio(self) -> Tensor:
        clipped = self[ClippedSum.CLIPPED_P]
        return torch.where(clipped > 0, torch.log(clipped) - self._log_norm(), 0.0)

    def _edge(self, gap: ClippedSum, p: ClippedSum, moving: ClippedSum) -> Tensor:
        """Derivative of L by an edge, up to its sign and the softness."""
        remainder = self.spec.remainder
        if remainder == "none":
            return self[gap]
        if remainder == "truncate":
            kept = self[ClippedSum.KEPT_P]
            return (self[gap] - self[ClippedSum.KEPT_GAP] / kept * self[p]) / kept
        # The part of the student's weighted mass that moves with the edge.
        share = self[moving] / self[ClippedSum.TOTAL]
        if remainder == "bucket":
            return self[gap] - (1 + self._log_ratio()) * self[p] + self[ClippedSum.CLIPPED_P] * share
        kept = self[ClippedSum.KEPT_P]
        return (self[gap] - (self[ClippedSum.KEPT_GAP] / kept + 1) * self[p]) / kept + share
