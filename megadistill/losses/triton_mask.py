"""The mask of DAC-KL in Triton, and the masses that its edges cut.

The formulas are those of ``soft_mask`` and ``edge_masses`` in ``tile_math``, which explains them.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def floored_exp(values, FLOOR: tl.constexpr):
    """Computes exp, not below exp(-FLOOR)."""
    return tl.exp(tl.maximum(values, -FLOOR))


@triton.jit
def edges(
    lp, theta_l, theta_u, columns, top_column, last_column, softness_inverse: tl.constexpr, HAS_BUCKET: tl.constexpr,
    HAS_UPPER: tl.constexpr, IS_NONE: tl.constexpr,
):  # fmt: skip
    """Without an upper edge the farther one is beyond all others."""
    lower = (lp - theta_l) * softness_inverse
    near, far, is_lower = lower, lower * 0.0 + 1e12, lower == lower
    if HAS_UPPER:
        upper = (theta_u - lp) * softness_inverse
        near, far, is_lower = tl.minimum(lower, upper), tl.maximum(lower, upper), lower < upper
    if not IS_NONE:
        near, far = tl.where(columns == top_column, 1e12, near), tl.where(columns == top_column, 1e12, far)
    if HAS_BUCKET:
        near, far = tl.where(columns == last_column, -1e12, near), tl.where(columns == last_column, 1e12, far)
    return near, far, is_lower


@triton.jit
def soft_mask(
    near, far, is_lower, is_top, IS_BUCKET: tl.constexpr, HAS_UPPER: tl.constexpr, IS_NONE: tl.constexpr,
    F: tl.constexpr,
):  # fmt: skip
    """Returns kept, clipped, log_weight, factor, and of the edges lower, upper, factor_l, factor_u, density_l."""
    log_weight = tl.minimum(-near if IS_BUCKET else near, 0.0)
    distance = tl.abs(near)
    e = tl.where(distance > 80.0 * F, 0.0, floored_exp(-distance, 24.0 * F))
    is_inside = near > 0
    r = 1.0 / (1.0 + e)
    er = e * r
    near_kept, near_clipped = tl.where(is_inside, r, er), tl.where(is_inside, er, r)
    kept, clipped, factor = near_kept, near_clipped, r
    lower, density_l = near_kept * near_clipped, near_kept * near_clipped
    upper, factor_u = lower * 0.0, lower * 0.0
    factor_l = kept * r if IS_BUCKET else factor * clipped
    if HAS_UPPER:
        far_relative = floored_exp(tl.maximum(near, 0.0) - far, 20.0 * F)
        far_kept = 1.0 / (1.0 + tl.where(is_inside, far_relative * e, far_relative))
        far_clipped_relative = far_relative * far_kept
        far_clipped = tl.where(is_inside, far_clipped_relative * e, far_clipped_relative)
        kept = near_kept * far_kept
        clipped = near_clipped + near_kept * far_clipped
        if IS_BUCKET:
            factor = r + near_kept * far_clipped_relative
            factor_near, factor_far = kept * r, kept * far_clipped_relative
        else:
            factor = r * far_kept
            factor_near, factor_far = factor * near_clipped, factor * far_clipped
        lower = kept * tl.where(is_lower, near_clipped, far_clipped)
        upper = kept * tl.where(is_lower, far_clipped, near_clipped)
        factor_l, factor_u = tl.where(is_lower, factor_near, factor_far), tl.where(is_lower, factor_far, factor_near)
        density_l = tl.where(is_lower, density_l, far_kept * far_clipped)
    if IS_NONE:
        kept, clipped = tl.where(is_top, kept + 1.0, kept), tl.where(is_top, 0.0, clipped)
    return kept, clipped, log_weight, factor, lower, upper, factor_l, factor_u, density_l


@triton.jit
def _masses_beyond(lp, p, is_rest, middle, nodes, scale: tl.constexpr, IS_WIDE: tl.constexpr, F: tl.constexpr):
    """The sums of p sigmoid(scale (node - lp)), one for each node; ``lp`` and ``p`` are columns of classes."""
    if IS_WIDE:
        weight = 1.0 / (1.0 + tl.exp(tl.minimum((lp[:, None] - nodes[None, :]) * scale, 80.0 * F)))
    else:
        relative = tl.exp(tl.minimum(tl.maximum((lp - middle) * scale, -80.0 * F), 80.0 * F))
        weight = 1.0 / (1.0 + relative[:, None] * tl.exp((middle - nodes) * scale)[None, :])
    # What is not listed lies below every lower edge, and below every upper one, too.
    weight = tl.where(is_rest[:, None], 1.0 if scale > 0 else 0.0, weight)
    return tl.sum(p[:, None] * weight, 0)


@triton.jit
def edge_masses_kernel(
    teacher, teacher_max, teacher_log, top_column, lower, upper, out, num_classes, stride, num_nodes: tl.constexpr,
    inverse: tl.constexpr, softness_inverse: tl.constexpr,
    IS_WIDE: tl.constexpr, HAS_UPPER: tl.constexpr, HAS_BUCKET: tl.constexpr, F: tl.constexpr, NODES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """See ``tile_math.edge_masses``."""
    token = tl.program_id(0).to(tl.int64)
    columns, node = tl.arange(0, BLOCK), tl.arange(0, NODES)
    max_t, log_t, top = tl.load(teacher_max + token), tl.load(teacher_log + token), tl.load(top_column + token)
    # A power of two is wanted: the last node stands for those that are too many.
    place = token * num_nodes + tl.minimum(node, num_nodes - 1)
    low = tl.load(lower + place)
    low_middle = 0.5 * (tl.load(lower + token * num_nodes) + tl.load(lower + token * num_nodes + num_nodes - 1))
    high, high_middle = low, low_middle
    if HAS_UPPER:
        high = tl.load(upper + place)
        high_middle = 0.5 * (tl.load(upper + token * num_nodes) + tl.load(upper + token * num_nodes + num_nodes - 1))
    below, above = low * 0.0, low * 0.0
    for start in range(0, num_classes, BLOCK):
        at = start + columns
        is_class = at < num_classes
        lp = (tl.load(teacher + token * stride + at, mask=is_class, other=0.0) - max_t) * inverse - log_t
        lp = tl.where(is_class, lp, -1.0)
        p = tl.where(is_class & (at != top), floored_exp(lp, 41.0 * F), 0.0)
        is_rest = (at == num_classes - 1) & HAS_BUCKET
        below += _masses_beyond(lp, p, is_rest, low_middle, low, softness_inverse, IS_WIDE, F)
        if HAS_UPPER:
            above += _masses_beyond(lp, p, is_rest, high_middle, high, -softness_inverse, IS_WIDE, F)
    width = 2 * num_nodes if HAS_UPPER else num_nodes
    tl.store(out + token * width + node, below, mask=node < num_nodes)
    if HAS_UPPER:
        tl.store(out + token * width + num_nodes + node, above, mask=node < num_nodes)
