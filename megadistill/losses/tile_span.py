"""The span term of pairs of neighbors (paper: Eq. 10) as plain functions of tiles, like those of ``tile_math``.

Suffixes: C tokens, Vs this rank's classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megadistill.losses.elementary import bounded_exp, exp_floor, sum_classes
from megadistill.losses.tile_math import derivative, log_p, log_q
from megadistill.losses.tiles import GradientWeights, LogNormalizers, MaskBounds, TileSpec


class PairShare(NamedTuple):
    """Each token's part in one pair [C]: the row of the pair in the tile of ``pair_sums``, and its weight (0: none)."""

    row: Tensor
    weight: Tensor


def span_sums(spec: TileSpec, student_CVs: Tensor, teacher_CVs: Tensor, norms: LogNormalizers) -> Tensor:
    """Sums [C - 1, 2] of each pair of neighboring tokens: the columns of ``SpanSum``."""
    lq, lp = _span_logs(spec, student_CVs, teacher_CVs, norms)
    student = bounded_exp(lq[:-1] + lq[1:])
    difference = student - bounded_exp(lp[:-1] + lp[1:])
    return torch.stack([sum_classes(difference * difference), sum_classes(difference * student)], -1)


def span_gradient(
    spec: TileSpec,
    student_CVs: Tensor,
    teacher_CVs: Tensor,
    norms: LogNormalizers,
    weights: GradientWeights,
    out_CVs: Tensor,
) -> None:
    """Adds the span part of the derivative to ``out_CVs``."""
    assert weights.span_pair is not None and weights.span_inner is not None
    q, p = (bounded_exp(logs) for logs in _span_logs(spec, student_CVs, teacher_CVs, norms))
    student = q[:-1] * q[1:]
    weight = weights.span_pair[:-1].unsqueeze(-1)
    through_pair = (student - p[:-1] * p[1:]) * student * weight
    normalizer = weight * weights.span_inner[:-1].unsqueeze(-1)
    no_pair, no_norm = torch.zeros_like(through_pair[:1]), torch.zeros_like(normalizer[:1])
    # Each position belongs to the pair that it starts and to the one that it ends.
    through = torch.cat([through_pair, no_pair]) + torch.cat([no_pair, through_pair])
    norm = torch.cat([normalizer, no_norm]) + torch.cat([no_norm, normalizer])
    out_CVs.add_(through - q * norm)


def pair_sums(
    spec: TileSpec,
    student_CVs: Tensor,
    teacher_CVs: Tensor,
    norms: LogNormalizers,
    first: Tensor,
    out_PVs: Tensor,
) -> Tensor:
    """What ``span_sums`` returns [P, 2], of the pairs that the tokens ``first`` [P] start.

    Writes (r^S - r^T) r^S of each class to ``out_PVs``, from which ``gradient_with_pairs`` makes the derivative.
    """
    lq, lp = _span_logs(spec, student_CVs, teacher_CVs, norms)
    # torch's exp, which Inductor takes for slow enough to keep its results: the store and the sums are one loop.
    student = (lq[first] + lq[first + 1]).exp()
    difference = student - (lp[first] + lp[first + 1]).exp()
    through = difference * student
    out_PVs.copy_(through)
    return torch.stack([(difference * difference).sum(-1), through.sum(-1)], -1)


def gradient_with_pairs(
    spec: TileSpec,
    student_CVs: Tensor,
    teacher_CVs: Tensor,
    norms: LogNormalizers,
    bounds: MaskBounds | None,
    weights: GradientWeights,
    before: PairShare,
    after: PairShare,
    out_CVs: Tensor,
    pair_PVs: Tensor,
) -> None:
    """Writes the derivative with its span part, without its label part.

    ``before`` and ``after`` are the pairs that each token ends and starts, rows of ``pair_PVs``.
    """
    result = derivative(spec, student_CVs, teacher_CVs, norms, bounds, weights)
    for side in (before, after):
        weight = side.weight.unsqueeze(-1)
        # A token without a pair has the place of another one's: nothing of that may come here, not even NaN.
        result = result + torch.where(weight != 0, weight * pair_PVs[side.row], 0.0)
    out_CVs.copy_(result)


def gradient_with_pairs_in_place(
    spec: TileSpec,
    student_CVs: Tensor,
    teacher_CVs: Tensor,
    norms: LogNormalizers,
    bounds: MaskBounds | None,
    weights: GradientWeights,
    before: PairShare,
    after: PairShare,
    pair_PVs: Tensor,
) -> None:
    """``gradient_with_pairs`` with ``student_CVs`` as ``out_CVs``. See ``tile_math.gradient_in_place``."""
    gradient_with_pairs(spec, student_CVs, teacher_CVs, norms, bounds, weights, before, after, student_CVs, pair_PVs)


def _span_logs(
    spec: TileSpec, student_CVs: Tensor, teacher_CVs: Tensor, norms: LogNormalizers
) -> tuple[Tensor, Tensor]:
    """Log q and log p as factors of a span's product."""
    floor = exp_floor(student_CVs, 20.0)
    return log_q(spec, student_CVs, norms).clamp(min=floor), log_p(spec, teacher_CVs, norms).clamp(min=floor)
