"""The work between the matrix products, as plain functions of tiles: eager torch runs them, torch.compile fuses them.

Each is one pass over tiles that stay in the cache token by token. Everything is exact in the log domain: probabilities
that underflow still carry their share of log Rq. Suffixes: C tokens, Vs this rank's classes, G groups of classes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megadistill.losses.divergences import Setting, Share, saturation
from megadistill.losses.elementary import bounded_exp, exp_floor, exp_of_gap, floored_exp, log1p_of_share, sum_classes
from megadistill.losses.tiles import (
    UPPER_EDGE,
    ClippedSum,
    EdgeNodes,
    GradientWeights,
    LocalStatistics,
    LogNormalizers,
    MaskBounds,
    TileSpec,
    group_width,
)

_NEVER = 1e12  # an edge beyond all others, and finite: inf - inf is not a number


def statistics(spec: TileSpec, student_CVs: Tensor, teacher_CVs: Tensor | None) -> LocalStatistics:
    """Maxima and sums of exponentials of one shard, and those of the teacher's groups of classes."""
    inverse = 1.0 / spec.temperature
    student_max = student_CVs.amax(-1)
    gap_CVs = student_CVs - student_max.unsqueeze(-1)
    student_sum = sum_classes(exp_of_gap(_tempered(gap_CVs, inverse)))
    untempered_sum = sum_classes(exp_of_gap(gap_CVs)) if spec.has_untempered else None
    if teacher_CVs is None:
        return LocalStatistics(student_max, student_sum, untempered_sum, None, None, None, None)
    width = group_width(teacher_CVs.shape[-1])
    if width == 1:
        teacher_max = teacher_CVs.amax(-1)
        teacher_sum = sum_classes(exp_of_gap(_tempered(teacher_CVs - teacher_max.unsqueeze(-1), inverse)))
        return LocalStatistics(student_max, student_sum, untempered_sum, teacher_max, teacher_sum, None, None)
    group_max, group_sum = _groups(teacher_CVs, width, inverse)
    teacher_max = group_max.amax(-1)
    relative_CG = _tempered(group_max - teacher_max.unsqueeze(-1), inverse).exp()
    return LocalStatistics(
        student_max, student_sum, untempered_sum, teacher_max, (group_sum * relative_CG).sum(-1), group_max, group_sum
    )


def sums(
    spec: TileSpec, student_CVs: Tensor, teacher_CVs: Tensor, norms: LogNormalizers, bounds: MaskBounds | None
) -> Tensor:
    """Sums [C, num_sums] over this shard's classes: the columns of ``ClippedSum`` or of ``DivergenceSum``."""
    lp, lq = log_p(spec, teacher_CVs, norms), log_q(spec, student_CVs, norms)
    p = floored_exp(lp)
    p_gap = p * (lp - lq)
    kl = sum_classes(p_gap)
    if not spec.is_clipped:
        if spec.formula is None:
            return kl.unsqueeze(-1)
        value, slope = spec.formula(lp, lq, p, floored_exp(lq), _share(spec, norms))
        return torch.stack([kl, sum_classes(value), sum_classes(slope)], -1)
    assert bounds is not None
    mask = soft_mask(spec, lp, bounds, spec.has_edges)
    if mask.log_kept is not None:
        p_gap = p_gap + p * mask.log_kept
    columns = {
        ClippedSum.KL: kl,
        ClippedSum.KEPT_GAP: sum_classes(mask.kept * p_gap),
        ClippedSum.KEPT_P: sum_classes(mask.kept * p),
        ClippedSum.CLIPPED_P: sum_classes(mask.clipped * p),
        ClippedSum.CLASSES: sum_classes(mask.kept),
    }
    term = lq
    if spec.has_totals:
        # An upper bound of each term is enough to shift by, and costs no exponential.
        shift = (lq + _log_weight(spec, _edges(spec, lp, bounds)[0])).amax(-1)
        term = floored_exp(lq + mask.log_weight - shift.unsqueeze(-1), 35.0, is_nested=spec.has_upper)
        columns |= {ClippedSum.SHIFT: shift, ClippedSum.TOTAL: sum_classes(term * mask.factor)}
    if mask.edges is not None:
        columns |= _edge_sums(spec, lp, bounds, mask.edges, p, p_gap, term)
    return torch.stack([columns[column] for column in ClippedSum if column in columns], -1)  # spec.columns


def edge_masses(
    spec: TileSpec, teacher_CVs: Tensor, norms: LogNormalizers, top_column: Tensor, nodes: EdgeNodes
) -> Tensor:
    """This shard's teacher mass [C, D] that a lower edge at each node cuts, then the same [C, D] of an upper edge.

    The top class is left out; the class that stands for what is not listed lies below every lower edge.
    """
    lp = log_p(spec, teacher_CVs, norms)
    every_p = floored_exp(lp)
    p = torch.where(_is_column(lp, top_column), 0.0, every_p)
    is_rest = _is_rest(lp) if spec.has_bucket else None
    masses = _masses_beyond(spec, lp, p, nodes.lower, 1.0, is_rest, every_p)
    if nodes.upper is not None:
        masses += _masses_beyond(spec, lp, p, nodes.upper, -1.0, is_rest, every_p)
    return torch.stack(masses, -1)


def _masses_beyond(
    spec: TileSpec, lp: Tensor, p: Tensor, nodes: Tensor, sign: float, is_rest: Tensor | None, every_p: Tensor
) -> list[Tensor]:
    """The sum of p sigmoid(sign (node - log p) / s) for each of the nodes; ``every_p`` is p, the top class included."""
    scale, limit = sign / spec.softness, saturation(lp)
    if is_rest is not None:
        lp = torch.where(is_rest, -_NEVER * spec.softness, lp)
    num_nodes = nodes.shape[-1]
    if spec.is_wide:  # one exponential for all nodes would overflow
        return [sum_classes(p * torch.sigmoid((nodes[:, d : d + 1] - lp) * scale)) for d in range(num_nodes)]
    middle = 0.5 * (nodes[:, :1] + nodes[:, -1:])
    steps = ((middle - nodes) * scale).exp()
    # The lower limit is so far below all nodes that the edge is 1, and few products are denormal.
    lowest, highest = -0.7 * limit, limit
    num_squares = _num_squares(scale)
    if is_rest is None and num_squares is not None:  # a power of p instead of another exponential
        relative = (every_p * (-middle).exp()).clamp(math.exp(lowest / scale), math.exp(highest / scale))
        for _ in range(num_squares):
            relative = relative * relative
    else:
        relative = bounded_exp(((lp - middle) * scale).clamp(lowest, highest))
    # A division costs no more than sharing one among three. Where the class is far above a node, the edge is 0.
    terms = [relative * steps[:, d : d + 1] for d in range(num_nodes)]
    if sign < 0:  # most classes are far below an upper edge: their products must not be denormal numbers
        terms = [term.clamp(max=math.exp(-exp_floor(lp, 44.0))) for term in terms]
    return [sum_classes(p / (1.0 + term)) for term in terms]


def _num_squares(exponent: float) -> int | None:
    """How often a number has to be squared for this power of it; None where that is no way to get it."""
    return {1.0: 0, 2.0: 1, 4.0: 2, 8.0: 3}.get(exponent)


def gradient(
    spec: TileSpec,
    student_CVs: Tensor,
    teacher_CVs: Tensor | None,
    norms: LogNormalizers,
    bounds: MaskBounds | None,
    weights: GradientWeights,
    out_CVs: Tensor,
) -> None:
    """Writes the derivative by the student's logits to ``out_CVs``, without its label and span parts."""
    out_CVs.copy_(derivative(spec, student_CVs, teacher_CVs, norms, bounds, weights))


def gradient_in_place(
    spec: TileSpec,
    student_CVs: Tensor,
    teacher_CVs: Tensor | None,
    norms: LogNormalizers,
    bounds: MaskBounds | None,
    weights: GradientWeights,
) -> None:
    """``gradient`` with ``student_CVs`` as ``out_CVs``.

    A function of its own: torch's cache of compiled code takes calls whose arguments are one tensor for calls of two.
    """
    gradient(spec, student_CVs, teacher_CVs, norms, bounds, weights, student_CVs)


def derivative(
    spec: TileSpec,
    student_CVs: Tensor,
    teacher_CVs: Tensor | None,
    norms: LogNormalizers,
    bounds: MaskBounds | None,
    weights: GradientWeights,
) -> Tensor:
    """What ``gradient`` writes."""
    lq = log_q(spec, student_CVs, norms)
    result = weights.student.unsqueeze(-1) * floored_exp(lq)
    if weights.untempered is not None and norms.untempered_log is not None:
        untempered = (student_CVs - norms.student_max.unsqueeze(-1)) - norms.untempered_log.unsqueeze(-1)
        result = result + weights.untempered.unsqueeze(-1) * floored_exp(untempered)
    if weights.teacher is not None and teacher_CVs is not None:
        lp = log_p(spec, teacher_CVs, norms)
        factor = weights.teacher.unsqueeze(-1)
        if spec.is_clipped:
            assert bounds is not None
            mask = soft_mask(spec, lp, bounds, has_edges=False)
            result = result - factor * mask.kept * floored_exp(lp)
            if weights.bucket_coef is not None and weights.log_norm is not None:
                bucket = floored_exp(lq + mask.log_weight - weights.log_norm.unsqueeze(-1)) * mask.factor
                result = result + weights.bucket_coef.unsqueeze(-1) * bucket
        elif spec.formula is None:
            result = result - factor * floored_exp(lp)
        else:
            result = result + factor * spec.formula(lp, lq, floored_exp(lp), floored_exp(lq), _share(spec, norms))[1]
    return result


class MaskEdges(NamedTuple):
    """Parts of the mask [C, Vs] for the derivatives by its thresholds; None without an upper edge.

    Attributes:
        lower: Softness times the derivative of m by the lower threshold, without its sign.
        upper: The same by the upper threshold.
        factor_l: As ``SoftMask.factor``, for the part of q's weight that moves with theta_l.
        factor_u: The same for theta_u.
        density_l: The derivative of the lower sigmoid alone, times the softness.
    """

    lower: Tensor
    factor_l: Tensor
    upper: Tensor | None = None
    factor_u: Tensor | None = None
    density_l: Tensor | None = None


class SoftMask(NamedTuple):
    """The mask m = sigmoid((log p - theta_l)/s) sigmoid((theta_u - log p)/s), 1 at the top class, in parts [C, Vs].

    Attributes:
        kept: m; 1 + m at the top class where it is appended (none).
        clipped: 1 - m, not computed as a difference; 0 at the top class.
        log_weight: The weight of q in the loss's log-domain sum (1 - m with a bucket, m when renormalizing) is
            exp(log_weight) * factor, so that it never underflows.
        factor: Between 1/4 and 2.
        edges: Only where the thresholds' derivatives are wanted.
        log_kept: Log of ``kept``, finite where that is 0; truncate only.
    """

    kept: Tensor
    clipped: Tensor
    log_weight: Tensor
    factor: Tensor
    edges: MaskEdges | None = None
    log_kept: Tensor | None = None


def soft_mask(spec: TileSpec, lp: Tensor, bounds: MaskBounds, has_edges: bool) -> SoftMask:
    """The mask at teacher log-probabilities [C, Vs].

    Of the two edges the nearer one may be on either side of 0, the farther one is not negative. With e = exp(-|near|)
    the near sigmoid needs only e and r = 1/(1+e): nothing overflows, and no difference cancels.
    """
    near, far, is_lower = _edges(spec, lp, bounds)
    log_weight = _log_weight(spec, near)
    distance = near.abs()
    # Far inside nothing is clipped, not even the floor's little: it would meet a log Rq as far below.
    e = torch.where(distance > saturation(lp), 0.0, floored_exp(-distance, 24.0, is_nested=spec.has_upper))
    is_inside = near > 0
    r = 1.0 / (1.0 + e)
    er = e * r
    kept, clipped = torch.where(is_inside, r, er), torch.where(is_inside, er, r)
    is_bucket = spec.remainder == "bucket"
    log_kept = near.clamp(-saturation(lp), 0.0) - log1p_of_share(e) if spec.remainder == "truncate" else None
    edges: MaskEdges | None
    if far is None or is_lower is None:
        factor = r
        edges = MaskEdges(kept * clipped, kept * r if is_bucket else factor * clipped)
    else:
        near_kept, near_clipped = kept, clipped
        # exp(-far), over e where near is positive
        far_relative = floored_exp(near.clamp(min=0.0) - far, 20.0, is_nested=True)
        far_e = torch.where(is_inside, far_relative * e, far_relative)
        far_kept = 1.0 / (1.0 + far_e)
        far_clipped_relative = far_relative * far_kept
        far_clipped = torch.where(is_inside, far_clipped_relative * e, far_clipped_relative)
        kept, clipped = near_kept * far_kept, near_clipped + near_kept * far_clipped
        log_kept = None if log_kept is None else log_kept - log1p_of_share(far_e)
        factor = r + near_kept * far_clipped_relative if is_bucket else r * far_kept
        factor_near = kept * r if is_bucket else factor * near_clipped
        factor_far = kept * far_clipped_relative if is_bucket else factor * far_clipped
        edges = MaskEdges(
            lower=kept * torch.where(is_lower, near_clipped, far_clipped),
            factor_l=torch.where(is_lower, factor_near, factor_far),
            upper=kept * torch.where(is_lower, far_clipped, near_clipped),
            factor_u=torch.where(is_lower, factor_far, factor_near),
            density_l=torch.where(is_lower, near_kept * near_clipped, far_kept * far_clipped),
        )
    if spec.remainder == "none":
        is_top = _is_column(lp, bounds.top_column)
        kept, clipped = kept + is_top, torch.where(is_top, 0.0, clipped)
    return SoftMask(kept, clipped, log_weight, factor, edges if has_edges else None, log_kept)


def _edge_sums(
    spec: TileSpec, lp: Tensor, bounds: MaskBounds, edges: MaskEdges, p: Tensor, p_gap: Tensor, term: Tensor
) -> dict[ClippedSum, Tensor]:
    """The sums for the derivatives by the thresholds; ``term`` is the student's side, where it has one."""
    columns = {ClippedSum.GAP_L: sum_classes(edges.lower * p_gap)}
    # Without the top class, whose own mask moves where it is not 1 by definition (none), and what is not listed.
    beside = torch.where(_is_column(lp, bounds.top_column), 0.0, p) if spec.remainder == "none" or spec.has_upper else p
    if spec.has_bucket:
        beside = torch.where(_is_rest(lp), 0.0, beside)
    columns[ClippedSum.P_L] = sum_classes(edges.lower * beside)
    if spec.has_totals:
        columns[ClippedSum.TOTAL_L] = sum_classes(term * edges.factor_l)
    if edges.upper is None or edges.factor_u is None or edges.density_l is None:
        return columns
    above = (bounds.theta_u.unsqueeze(-1) - lp) / spec.softness - UPPER_EDGE
    limit = 0.5 * saturation(lp)  # so that a product with p is no denormal number
    e = bounded_exp(above.clamp(-limit, limit))
    share = 1.0 / (1.0 + e)
    columns |= {
        ClippedSum.GAP_U: sum_classes(edges.upper * p_gap),
        ClippedSum.P_U: sum_classes(edges.upper * beside),
        ClippedSum.DENSITY_L: sum_classes(edges.density_l * beside),
        ClippedSum.DENSITY_U: sum_classes(e * share * share * beside),
    }
    if spec.has_totals:
        columns[ClippedSum.TOTAL_U] = sum_classes(term * edges.factor_u)
    return columns


def log_q(spec: TileSpec, student_CVs: Tensor, norms: LogNormalizers) -> Tensor:
    """The student's log-probabilities."""
    return _log_probs(spec, student_CVs, norms.student_max, norms.student_log)


def log_p(spec: TileSpec, teacher_CVs: Tensor, norms: LogNormalizers) -> Tensor:
    """The teacher's log-probabilities."""
    assert norms.teacher_max is not None and norms.teacher_log is not None
    return _log_probs(spec, teacher_CVs, norms.teacher_max, norms.teacher_log)


def _share(spec: TileSpec, norms: LogNormalizers) -> Share | Setting:
    """What the formula gets: one number, or one for each token [C, 1]."""
    return spec.share if norms.share is None else norms.share.unsqueeze(-1)


def _log_probs(spec: TileSpec, tile_CVs: Tensor, largest: Tensor, log_sum: Tensor) -> Tensor:
    # One after the other: the sum of the two would be rounded to the size of the logits.
    return _tempered(tile_CVs - largest.unsqueeze(-1), 1.0 / spec.temperature) - log_sum.unsqueeze(-1)


def _edges(spec: TileSpec, lp: Tensor, bounds: MaskBounds) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Distances to the nearer and the farther edge, and whether the nearer one is the lower; None where there is one.

    Distances are in units of the softness, positive inside.
    """
    inverse = 1.0 / spec.softness
    near = (lp - bounds.theta_l.unsqueeze(-1)) * inverse
    far = is_lower = None
    if spec.has_upper:
        upper = (bounds.theta_u.unsqueeze(-1) - lp) * inverse
        near, far, is_lower = torch.minimum(near, upper), torch.maximum(near, upper), near < upper
    if spec.remainder != "none":
        is_top = _is_column(lp, bounds.top_column)
        near, far = torch.where(is_top, _NEVER, near), None if far is None else torch.where(is_top, _NEVER, far)
    if spec.has_bucket:
        is_rest = _is_rest(lp)
        near, far = torch.where(is_rest, -_NEVER, near), None if far is None else torch.where(is_rest, _NEVER, far)
    return near, far, is_lower


def _is_column(lp: Tensor, column: Tensor) -> Tensor:
    # 32 bits: vectors hold as many as they hold numbers.
    own = torch.arange(lp.shape[-1], device=lp.device, dtype=torch.int32)
    return own == column.to(torch.int32).unsqueeze(-1)


def _is_rest(lp: Tensor) -> Tensor:
    """The last column, where it stands for all classes that are not listed."""
    return torch.arange(lp.shape[-1], device=lp.device) == lp.shape[-1] - 1


def _log_weight(spec: TileSpec, near: Tensor) -> Tensor:
    """Log of 1 - m or of m to within a factor of 4, without an exponential."""
    return (-near if spec.remainder == "bucket" else near).clamp(max=0.0)


def _groups(teacher_CVs: Tensor, width: int, inverse: float) -> tuple[Tensor, Tensor]:
    """Maximum and tempered sum [C, G] of each group of ``width`` neighbors; a last, shorter group takes the rest."""
    whole = teacher_CVs.shape[-1] // width * width
    largest, total = [], []
    parts = [teacher_CVs[:, :whole].unflatten(1, (whole // width, width))]
    if whole < teacher_CVs.shape[-1]:
        parts.append(teacher_CVs[:, whole:].unsqueeze(1))
    for part in parts:
        largest.append(part.amax(-1))
        total.append(exp_of_gap(_tempered(part - largest[-1].unsqueeze(-1), inverse)).sum(-1))
    return (largest[0], total[0]) if len(parts) == 1 else (torch.cat(largest, -1), torch.cat(total, -1))


def _tempered(values: Tensor, inverse: float) -> Tensor:
    return values if inverse == 1.0 else values * inverse
