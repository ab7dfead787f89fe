"""The work between the matrix products, as plain functions of tiles: eager torch runs them, torch.compile fuses them.

Each is one pass over tiles that stay in the cache row by row. Everything is exact in the log domain: probabilities that
underflow still carry their share of log Rq. Suffixes: C rows, V this rank's classes, G groups of classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megadistill.losses.tiles import LocalStatistics, RowConstants, RowWeights, TileSpec, group_width

_NEVER = 1e12  # an edge beyond all others, and finite: inf - inf is not a number


def statistics(spec: TileSpec, student_CV: Tensor, teacher_CV: Tensor | None) -> LocalStatistics:
    """Maxima and sums of exponentials of one shard, and those of the teacher's groups of classes."""
    inverse = 1.0 / spec.temperature
    student_max = student_CV.amax(-1)
    gap_CV = student_CV - student_max.unsqueeze(-1)
    student_sum = _tempered(gap_CV, inverse).exp().sum(-1)
    plain_sum = gap_CV.exp().sum(-1) if spec.has_plain else None
    if teacher_CV is None:
        return LocalStatistics(student_max, student_sum, plain_sum, None, None, None, None)
    width = group_width(teacher_CV.shape[-1])
    if width == 1:
        teacher_max = teacher_CV.amax(-1)
        teacher_sum = _tempered(teacher_CV - teacher_max.unsqueeze(-1), inverse).exp().sum(-1)
        return LocalStatistics(student_max, student_sum, plain_sum, teacher_max, teacher_sum, None, None)
    group_max, group_sum = _groups(teacher_CV, width, inverse)
    teacher_max = group_max.amax(-1)
    relative_CG = _tempered(group_max - teacher_max.unsqueeze(-1), inverse).exp()
    return LocalStatistics(
        student_max, student_sum, plain_sum, teacher_max, (group_sum * relative_CG).sum(-1), group_max, group_sum
    )


def sums(spec: TileSpec, student_CV: Tensor, teacher_CV: Tensor, rows: RowConstants) -> Tensor:
    """[C, num_sums] sums over this shard's classes; the first is KL's.

    clipped: KL, D, P, Rp, with edges the sums of m nl p d, m nl p, m nu p d, m nu p; then the shift of the student's
    log-domain sum, that sum, and with edges its two edge sums. Others than forward KL: KL, value, slope.
    """
    lp, lq = log_p(spec, teacher_CV, rows), log_q(spec, student_CV, rows)
    p = _exp(lp)
    p_gap = p * (lp - lq)
    if spec.kind == "forward_kl":
        return p_gap.sum(-1, keepdim=True)
    if spec.kind != "clipped":
        value, slope = value_and_slope(spec, lp, lq)
        return torch.stack([p_gap.sum(-1), value.sum(-1), slope.sum(-1)], -1)
    # An upper bound of each term is enough to shift by, and costs no exponential.
    shift = (lq + _log_weight(spec, _edges(spec, lp, rows)[0])).amax(-1)
    mask = soft_mask(spec, lp, rows, spec.has_edges)
    mp, mp_gap = mask.kept * p, mask.kept * p_gap
    term = _exp(lq + mask.log_weight - shift.unsqueeze(-1), 35.0)
    columns = [p_gap.sum(-1), mp_gap.sum(-1), mp.sum(-1), (mask.clipped * p).sum(-1)]
    if mask.below is not None and mask.above is not None:
        columns += [(mask.below * mp_gap).sum(-1), (mask.below * mp).sum(-1)]
        columns += [(mask.above * mp_gap).sum(-1), (mask.above * mp).sum(-1)]
    columns += [shift, (term * mask.factor).sum(-1)]
    if mask.factor_l is not None and mask.factor_u is not None:
        columns += [(term * mask.factor_l).sum(-1), (term * mask.factor_u).sum(-1)]
    return torch.stack(columns, -1)


def gradient(
    spec: TileSpec,
    student_CV: Tensor,
    teacher_CV: Tensor | None,
    rows: RowConstants,
    weights: RowWeights,
    out_CV: Tensor,
) -> None:
    """Writes the derivative by the student's logits to `out_CV`, but for its label and span parts."""
    lq = log_q(spec, student_CV, rows)
    result = weights.student.unsqueeze(-1) * _exp(lq)
    if weights.plain is not None and rows.plain_log is not None:
        plain = (student_CV - rows.student_max.unsqueeze(-1)) - rows.plain_log.unsqueeze(-1)
        result = result + weights.plain.unsqueeze(-1) * _exp(plain)
    if weights.teacher is not None and teacher_CV is not None:
        lp = log_p(spec, teacher_CV, rows)
        factor = weights.teacher.unsqueeze(-1)
        if spec.kind == "forward_kl":
            result = result - factor * _exp(lp)
        elif spec.kind == "clipped":
            assert weights.share is not None and weights.log_norm is not None
            mask = soft_mask(spec, lp, rows, has_edges=False)
            share = _exp(lq + mask.log_weight - weights.log_norm.unsqueeze(-1)) * mask.factor
            result = result - factor * mask.kept * _exp(lp) + weights.share.unsqueeze(-1) * share
        else:
            result = result + factor * value_and_slope(spec, lp, lq)[1]
    out_CV.copy_(result)


def span_sums(spec: TileSpec, student_CV: Tensor, teacher_CV: Tensor, rows: RowConstants) -> Tensor:
    """[C - 1, 2] of each pair of neighbours: ||r^S - r^T||^2 and <r^S - r^T, r^S>, r = the product of both rows."""
    q, p = _span_factors(spec, student_CV, teacher_CV, rows)
    student = q[:-1] * q[1:]
    difference = student - p[:-1] * p[1:]
    return torch.stack([(difference * difference).sum(-1), (difference * student).sum(-1)], -1)


def span_gradient(
    spec: TileSpec,
    student_CV: Tensor,
    teacher_CV: Tensor,
    rows: RowConstants,
    weights: RowWeights,
    out_CV: Tensor,
) -> None:
    """Adds the span part of the derivative to `out_CV`."""
    assert weights.span_pair is not None and weights.span_inner is not None
    q, p = _span_factors(spec, student_CV, teacher_CV, rows)
    student = q[:-1] * q[1:]
    weight = weights.span_pair[:-1].unsqueeze(-1)
    through_pair = (student - p[:-1] * p[1:]) * student * weight
    normaliser = weight * weights.span_inner[:-1].unsqueeze(-1)
    nothing = torch.zeros_like(through_pair[:1])
    nothing_1 = torch.zeros_like(normaliser[:1])
    # Each row belongs to the pair that it starts and to the one that it ends.
    through = torch.cat([through_pair, nothing]) + torch.cat([nothing, through_pair])
    norm = torch.cat([normaliser, nothing_1]) + torch.cat([nothing_1, normaliser])
    out_CV.add_(through - q * norm)


class SoftMask(NamedTuple):
    """[C, V] parts of the mask m = sigmoid((log p - theta_l)/s) sigmoid((theta_u - log p)/s), 1 at the top class.

    kept, clipped: m and 1 - m, each formed directly; below, above: 1 minus the lower and the upper sigmoid.
    The weight of q in the loss's log-domain sum (1 - m with a bucket, m when renormalising) is exp(log_weight) * factor
    with a factor between 1/4 and 2, so that it never underflows; factor_l and factor_u likewise belong to the parts of
    that weight which move with theta_l and theta_u. What only edge sums need is None without them.
    """

    kept: Tensor
    clipped: Tensor
    log_weight: Tensor
    factor: Tensor
    below: Tensor | None = None
    above: Tensor | None = None
    factor_l: Tensor | None = None
    factor_u: Tensor | None = None


def soft_mask(spec: TileSpec, lp: Tensor, rows: RowConstants, has_edges: bool) -> SoftMask:
    """The mask at teacher log-probabilities [C, V].

    Of the two edges the nearer one may be on either side of 0, the farther one is not negative. With e = exp(-|near|)
    all that is needed of the near sigmoid is e and r = 1/(1+e): no overflow, and no difference that could cancel.
    """
    near, far, is_lower = _edges(spec, lp, rows)
    log_weight = _log_weight(spec, near)
    distance = near.abs()
    # Far inside nothing is clipped, not even the floor's little: it would meet a log Rq as far below.
    e = torch.where(distance > _sure(lp), 0.0, _exp(-distance, 24.0))
    far_relative = _exp(near.clamp(min=0.0) - far, 20.0)  # exp(-far), over e where near is positive
    is_inside = near > 0
    r = 1.0 / (1.0 + e)
    er = e * r
    near_kept, near_clipped = torch.where(is_inside, r, er), torch.where(is_inside, er, r)
    far_kept = 1.0 / (1.0 + torch.where(is_inside, far_relative * e, far_relative))
    far_clipped_relative = far_relative * far_kept
    far_clipped = torch.where(is_inside, far_clipped_relative * e, far_clipped_relative)
    kept = near_kept * far_kept
    is_bucket = spec.remainder == "bucket"
    factor = r + near_kept * far_clipped_relative if is_bucket else r * far_kept
    mask = SoftMask(kept, near_clipped + near_kept * far_clipped, log_weight, factor)
    if not has_edges:
        return mask
    factor_near = kept * r if is_bucket else factor * near_clipped
    factor_far = kept * far_clipped_relative if is_bucket else factor * far_clipped
    return mask._replace(
        below=torch.where(is_lower, near_clipped, far_clipped),
        above=torch.where(is_lower, far_clipped, near_clipped),
        factor_l=torch.where(is_lower, factor_near, factor_far),
        factor_u=torch.where(is_lower, factor_far, factor_near),
    )


def value_and_slope(spec: TileSpec, lp: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
    """Terms phi [C, V] of a divergence sum_c phi(p_c, q_c), and q dphi/dq up to a multiple of q (which the row's
    normalisation takes out again): the derivative by a logit is slope - q * sum(slope)."""
    p, q = _exp(lp), _exp(lq)
    if spec.kind == "reverse_kl":
        value = q * (lq - lp)
        return value, value
    if spec.kind == "total_variation":
        difference = q - p
        return 0.5 * difference.abs(), 0.5 * q * difference.sign()
    # log(mixture / q) and log(mixture / p) from the gap: near p = q a quotient would lose all digits of its logarithm.
    share, gap = spec.mix, lp - lq
    if spec.kind == "skewed_forward_kl":
        log_mixture = _log_mixture(-gap, 1.0 - share)
        return -p * log_mixture, (share - 1.0) * q * (-log_mixture).exp()
    if spec.kind == "skewed_reverse_kl":
        log_mixture = _log_mixture(gap, 1.0 - share)
        return -q * log_mixture, -q * (log_mixture + share * (-log_mixture).exp())
    assert spec.kind == "jensen_shannon"
    of_student = (share - 1.0) * q * _log_mixture(gap, share)
    return of_student - share * p * _log_mixture(-gap, 1.0 - share), of_student


def log_q(spec: TileSpec, student_CV: Tensor, rows: RowConstants) -> Tensor:
    """The student's log-probabilities."""
    return _log_probs(spec, student_CV, rows.student_max, rows.student_log)


def log_p(spec: TileSpec, teacher_CV: Tensor, rows: RowConstants) -> Tensor:
    """The teacher's log-probabilities."""
    assert rows.teacher_max is not None and rows.teacher_log is not None
    return _log_probs(spec, teacher_CV, rows.teacher_max, rows.teacher_log)


def _log_probs(spec: TileSpec, tile_CV: Tensor, largest: Tensor, log_sum: Tensor) -> Tensor:
    # One after the other: the sum of the two would be rounded to the size of the logits.
    return _tempered(tile_CV - largest.unsqueeze(-1), 1.0 / spec.temperature) - log_sum.unsqueeze(-1)


def _edges(spec: TileSpec, lp: Tensor, rows: RowConstants) -> tuple[Tensor, Tensor, Tensor]:
    """Distances to the nearer and the farther edge in units of the softness, positive inside; whether the nearer one is
    the lower."""
    assert rows.theta_l is not None and rows.theta_u is not None and rows.top_column is not None
    inverse = 1.0 / spec.softness
    lower, upper = (lp - rows.theta_l.unsqueeze(-1)) * inverse, (rows.theta_u.unsqueeze(-1) - lp) * inverse
    column = torch.arange(lp.shape[-1], device=lp.device)
    is_top = column == rows.top_column.unsqueeze(-1)
    near, far = torch.minimum(lower, upper), torch.maximum(lower, upper)
    near, far = torch.where(is_top, _NEVER, near), torch.where(is_top, _NEVER, far)
    if spec.has_bucket:
        is_rest = column == lp.shape[-1] - 1
        near, far = torch.where(is_rest, -_NEVER, near), torch.where(is_rest, _NEVER, far)
    return near, far, lower < upper


def _log_weight(spec: TileSpec, near: Tensor) -> Tensor:
    """log(1 - m) or log m to within a factor of 4, without an exponential."""
    return (-near if spec.remainder == "bucket" else near).clamp(max=0.0)


def _sure(values: Tensor) -> float:
    """Distance in units of the softness from which an edge is a step."""
    return 640.0 if values.dtype == torch.float64 else 80.0


def _exp(values: Tensor, floor: float = 41.0) -> Tensor:
    """exp, not below exp(-floor) (float64: its eighth power). The floors are such that what they add is far below
    round-off, and that no product here is a denormal number: those are computed many times slower."""
    return values.clamp(min=-floor * (8.0 if values.dtype == torch.float64 else 1.0)).exp()


def _span_factors(spec: TileSpec, student_CV: Tensor, teacher_CV: Tensor, rows: RowConstants) -> tuple[Tensor, Tensor]:
    """q and p as factors of a span's product."""
    return _exp(log_q(spec, student_CV, rows), 20.0), _exp(log_p(spec, teacher_CV, rows), 20.0)


def _groups(teacher_CV: Tensor, width: int, inverse: float) -> tuple[Tensor, Tensor]:
    """[C, G] maximum and tempered sum of each group of `width` neighbours; a last, shorter group takes the rest."""
    whole = teacher_CV.shape[-1] // width * width
    largest, total = [], []
    parts = [teacher_CV[:, :whole].unflatten(1, (whole // width, width))]
    if whole < teacher_CV.shape[-1]:
        parts.append(teacher_CV[:, whole:].unsqueeze(1))
    for part in parts:
        largest.append(part.amax(-1))
        total.append(_tempered(part - largest[-1].unsqueeze(-1), inverse).exp().sum(-1))
    return (largest[0], total[0]) if len(parts) == 1 else (torch.cat(largest, -1), torch.cat(total, -1))


def _tempered(values: Tensor, inverse: float) -> Tensor:
    return values if inverse == 1.0 else values * inverse


def _log_mixture(gap: Tensor, share: float) -> Tensor:
    """log((1 - share) + share exp(gap)). Where the gap is too large for exp, the other side is 0 and so is its term."""
    return (share * gap.clamp(max=_sure(gap)).expm1()).log1p()
