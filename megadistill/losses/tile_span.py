"""The span term of pairs of neighbors (paper: Eq. 10) as plain functions of tiles, like those of ``tile_math``.

Suffixes: C tokens, Vs this rank's classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megadistill.losses.tile_math import derivative, exp_floor, log_p, log_q
from megadistill.losses.tiles import GradientWeights, LogNormalizers, MaskBounds, TileSpec


def span_sums(spec: TileSpec, student_CVs: Tensor, teacher_CVs: Tensor, norms: LogNormalizers) -> Tensor:
    """Sums [C - 1, 2] of each pair of neighboring tokens: the columns of ``SpanSum``."""
    lq, lp = _span_logs(spec, student_CVs, teacher_CVs, norms)
    student = (lq[:-1] + lq[1:]).exp()
    difference = student - (lp[:-1] + lp[1:]).exp()
    return torch.stack([(difference * difference).sum(-1), (difference * student).sum(-1)], -1)


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
    q, p = (logs.exp() for logs in _span_logs(spec, student_CVs, teacher_CVs, norms))
    student = q[:-1] * q[1:]
    weight = weights.span_pair[:-1].unsqueeze(-1)
    through_pair = (student - p[:-1] * p[1:]) * student * weight
    normalizer = weight * weights.span_inner[:-1].unsqueeze(-1)
    no_pair, no_norm = torch.zeros_like(through_pair[:1]), torch.zeros_like(normalizer[:1])
    # Each position belongs to the pair that it starts and to the one that it ends.
    through = torch.cat([through_pair, no_pair]) + torch.cat([no_pair, through_pair])
    norm = torch.cat([normalizer, no_norm]) + torch.cat([no_norm, normalizer])
    out_CVs.add_(through - q * norm)


def inner_gradient(
    spec: TileSpec,
    student_CVs: Tensor,
    teacher_CVs: Tensor,
    norms: LogNormalizers,
    bounds: MaskBounds | None,
    weights: GradientWeights,
    out_CVs: Tensor,
    outer: tuple[Tensor, Tensor, LogNormalizers],
    pair: Tensor,
    inner: Tensor,
) -> None:
    """Writes the derivative with its span part, without its label part, in one pass without temporaries.

    ``outer`` has the tiles and normalizers of one token more on either side; ``pair`` and ``inner`` are
    ``GradientWeights.span_pair`` and ``span_inner`` of all but the last of those.
    """
    lq, lp = _span_logs(spec, *outer)
    # An exponential that two rows share would be a whole tile in memory, which takes longer than a second one.
    before, after = slice(None, -1), slice(1, None)
    through = torch.zeros_like(student_CVs)
    for side in (before, after):
        of_student, of_teacher = lq[side], lp[side]
        student = (of_student[:-1] + of_student[1:]).exp()
        difference = student - (of_teacher[:-1] + of_teacher[1:]).exp()
        through = through + pair[side].unsqueeze(-1) * (difference * student)
    norm = (pair * inner)[before] + (pair * inner)[after]
    result = derivative(spec, student_CVs, teacher_CVs, norms, bounds, weights)
    out_CVs.copy_(result + (through - norm.unsqueeze(-1) * lq[1:-1].exp()))


def _span_logs(
    spec: TileSpec, student_CVs: Tensor, teacher_CVs: Tensor, norms: LogNormalizers
) -> tuple[Tensor, Tensor]:
    """Log q and log p as factors of a span's product."""
    floor = exp_floor(student_CVs, 20.0)
    return log_q(spec, student_CVs, norms).clamp(min=floor), log_p(spec, teacher_CVs, norms).clamp(min=floor)
