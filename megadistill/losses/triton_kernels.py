"""The kernels in Triton: ``tile_math`` in three passes over tiles that are too large for any cache.

- statistics: one program per token
- sums: one program per token, with running maxima for the log-domain sums
- gradient: one program per token and block of classes, span and label included, written once in the dtype that the next
  product reads

The formulas are those of ``tile_math``, which explains them; ``triton_backend`` launches the kernels. A divergence's
formula is passed to a kernel as a function, made from the source in ``divergences.py``.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
from types import FunctionType
from typing import Any

import triton
import triton.language as tl

from megadistill.losses.divergences import Formula
from megadistill.losses.tiles import UPPER_EDGE, ClippedSum, DivergenceSum, SpanSum
from megadistill.losses.triton_mask import edges, floored_exp, soft_mask

# Kernels may read constants only, not an enumeration.
_KL = tl.constexpr(int(ClippedSum.KL))  # the first column of either layout
_KEPT_GAP = tl.constexpr(int(ClippedSum.KEPT_GAP))
_KEPT_P = tl.constexpr(int(ClippedSum.KEPT_P))
_CLIPPED_P = tl.constexpr(int(ClippedSum.CLIPPED_P))
_CLASSES = tl.constexpr(int(ClippedSum.CLASSES))
_SHIFT = tl.constexpr(int(ClippedSum.SHIFT))
_TOTAL = tl.constexpr(int(ClippedSum.TOTAL))
_TOTAL_L = tl.constexpr(int(ClippedSum.TOTAL_L))
_TOTAL_U = tl.constexpr(int(ClippedSum.TOTAL_U))
_GAP_L = tl.constexpr(int(ClippedSum.GAP_L))
_P_L = tl.constexpr(int(ClippedSum.P_L))
_GAP_U = tl.constexpr(int(ClippedSum.GAP_U))
_P_U = tl.constexpr(int(ClippedSum.P_U))
_DENSITY_L = tl.constexpr(int(ClippedSum.DENSITY_L))
_DENSITY_U = tl.constexpr(int(ClippedSum.DENSITY_U))
_VALUE = tl.constexpr(int(DivergenceSum.VALUE))
_SLOPE = tl.constexpr(int(DivergenceSum.SLOPE))
_SQUARE = tl.constexpr(int(SpanSum.SQUARE))
_INNER = tl.constexpr(int(SpanSum.INNER))
_NUM_SPAN_SUMS = tl.constexpr(len(SpanSum))
_UPPER_EDGE = tl.constexpr(UPPER_EDGE)


@triton.jit
def statistics_kernel(
    student, teacher, student_max, student_sum, untempered_sum, teacher_max, teacher_sum, group_max, group_sum,
    num_classes, num_groups, stride,
    inverse: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_UNTEMPERED: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """See ``tile_math.statistics``."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    top_s = tl.load(student + token * stride)
    sum_s, sum_untempered = top_s * 0.0, top_s * 0.0
    top_t, sum_t = top_s, sum_s
    if HAS_TEACHER:
        top_t = tl.load(teacher + token * stride)
    for start in range(0, num_classes, BLOCK):
        is_class = start + columns < num_classes
        x = tl.load(student + token * stride + start + columns, mask=is_class, other=float("-inf"))
        largest = tl.maximum(top_s, tl.max(x, 0))
        sum_s = sum_s * tl.exp((top_s - largest) * inverse) + tl.sum(tl.exp((x - largest) * inverse), 0)
        if HAS_UNTEMPERED:
            sum_untempered = sum_untempered * tl.exp(top_s - largest) + tl.sum(tl.exp(x - largest), 0)
        top_s = largest
        if HAS_TEACHER:
            x = tl.load(teacher + token * stride + start + columns, mask=is_class, other=float("-inf"))
            largest = tl.maximum(top_t, tl.max(x, 0))
            sum_t = sum_t * tl.exp((top_t - largest) * inverse) + tl.sum(tl.exp((x - largest) * inverse), 0)
            top_t = largest
            if WIDTH > 1:
                groups = tl.reshape(x, (BLOCK // WIDTH, WIDTH))
                maxima = tl.max(groups, 1)
                # A group beyond the last class holds -inf alone; it is not stored.
                base = tl.where(maxima == float("-inf"), 0.0, maxima)
                totals = tl.sum(tl.exp((groups - base[:, None]) * inverse), 1)
                group = start // WIDTH + tl.arange(0, BLOCK // WIDTH)
                tl.store(group_max + token * num_groups + group, maxima, mask=group < num_groups)
                tl.store(group_sum + token * num_groups + group, totals, mask=group < num_groups)
    tl.store(student_max + token, top_s)
    tl.store(student_sum + token, sum_s)
    if HAS_UNTEMPERED:
        tl.store(untempered_sum + token, sum_untempered)
    if HAS_TEACHER:
        tl.store(teacher_max + token, top_t)
        tl.store(teacher_sum + token, sum_t)


@triton.jit
def _log_mixture(gap, share):
    """Log of (1 - share) + share exp(gap); by series where the gap is so small that exp(gap) - 1 would lose digits."""
    gap = tl.minimum(gap, 640.0 if gap.dtype == tl.float64 else 80.0)
    series = gap * (1.0 + gap * (0.5 + gap * (1.0 / 6.0 + gap * (1.0 / 24.0 + gap * (1.0 / 120.0 + gap / 720.0)))))
    x = share * tl.where(tl.abs(gap) < 0.05, series, tl.exp(gap) - 1.0)
    # log(1 + x) without losing the digits of a small x: the rounding of 1 + x is divided out.
    total = 1.0 + x
    small = total - 1.0
    return tl.where(small == 0.0, x, tl.log(total) * (x / tl.where(small == 0.0, 1.0, small)))


@triton.jit
def _plain_exp(x):
    return tl.exp(x)


@triton.jit
def _absolute(x):
    return tl.abs(x)


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


# The functions that a formula of ``divergences.py`` may call, under their names there.
_FORMULA_NAMES = {"exp": _plain_exp, "absolute": _absolute, "sign": _sign, "log_mixture": _log_mixture}


@functools.cache
def triton_formula(formula: Formula | None) -> Any:
    """A divergence's formula as a function for kernels: the same source, with Triton's functions for torch's."""
    if formula is None:
        return None
    assert isinstance(formula, FunctionType)
    # Triton looks up annotations too.
    names = {"__name__": __name__, "tl": tl, "Tensor": tl.tensor, "Share": None, "Exponents": None, **_FORMULA_NAMES}
    return triton.jit(FunctionType(formula.__code__, names, formula.__name__))


@triton.jit
def _divergence(lp, lq, share: tl.constexpr, shares, FORMULA: tl.constexpr, F: tl.constexpr):
    """Returns value and slope; a share of None is the token's own, at ``shares``."""
    p, q = floored_exp(lp, 41.0 * F), floored_exp(lq, 41.0 * F)
    if share is None:
        value, slope = FORMULA(lp, lq, p, q, tl.load(shares))
    else:
        value, slope = FORMULA(lp, lq, p, q, share)
    return value, slope


@triton.jit
def sums_kernel(
    student, teacher, student_max, student_log, teacher_max, teacher_log, shares, theta_l, theta_u, top_column, out,
    num_classes, stride, inverse: tl.constexpr, softness_inverse: tl.constexpr, share: tl.constexpr,
    IS_CLIPPED: tl.constexpr, FORMULA: tl.constexpr, IS_BUCKET: tl.constexpr, IS_TRUNCATE: tl.constexpr,
    IS_NONE: tl.constexpr, HAS_TOTALS: tl.constexpr, HAS_UPPER: tl.constexpr, HAS_EDGES: tl.constexpr,
    HAS_BUCKET: tl.constexpr, F: tl.constexpr, NUM_SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """See ``tile_math.sums``; writes to the columns of ``ClippedSum``, of which some may remain unwritten."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    max_s, log_s = tl.load(student_max + token), tl.load(student_log + token)
    max_t, log_t = tl.load(teacher_max + token), tl.load(teacher_log + token)
    zero = log_s * 0.0
    kl, kept_gap, kept_p, clipped_p, classes = zero, zero, zero, zero, zero
    gap_l, p_l, gap_u, p_u, dense_l, dense_u = zero, zero, zero, zero, zero, zero
    shift, total, total_l, total_u = zero - float("inf"), zero, zero, zero
    value_sum, slope_sum = zero, zero
    low, high, top = zero, zero, -1
    if IS_CLIPPED:
        low, high, top = tl.load(theta_l + token), tl.load(theta_u + token), tl.load(top_column + token)
    for start in range(0, num_classes, BLOCK):
        at = start + columns
        is_class = at < num_classes
        lq = (tl.load(student + token * stride + at, mask=is_class, other=0.0) - max_s) * inverse - log_s
        lp = (tl.load(teacher + token * stride + at, mask=is_class, other=0.0) - max_t) * inverse - log_t
        # Beyond the last class any finite number is fine.
        lq, lp = tl.where(is_class, lq, -1.0), tl.where(is_class, lp, -1.0)
        p = tl.where(is_class, floored_exp(lp, 41.0 * F), 0.0)
        p_gap = p * (lp - lq)
        kl += tl.sum(p_gap, 0)
        if IS_CLIPPED:
            near, far, is_lower = edges(
                lp, low, high, at, top, num_classes - 1, softness_inverse, HAS_BUCKET, HAS_UPPER, IS_NONE
            )
            kept, clipped, log_weight, factor, lower, upper, factor_l, factor_u, density_l = soft_mask(
                near, far, is_lower, at == top, IS_BUCKET, HAS_UPPER, IS_NONE, F
            )
            if IS_TRUNCATE:
                p_gap += p * tl.log(tl.maximum(kept, 1e-37 if F == 1.0 else 1e-300))
            kept_gap += tl.sum(kept * p_gap, 0)
            kept_p += tl.sum(kept * p, 0)
            clipped_p += tl.sum(clipped * p, 0)
            classes += tl.sum(tl.where(is_class, kept, 0.0), 0)
            if HAS_TOTALS:
                exponent = lq + log_weight
                largest = tl.maximum(shift, tl.max(tl.where(is_class, exponent, float("-inf")), 0))
                scale = tl.exp(shift - largest)
                term = tl.where(is_class, floored_exp(exponent - largest, 35.0 * F), 0.0)
                total = total * scale + tl.sum(term * factor, 0)
                if HAS_EDGES:
                    total_l = total_l * scale + tl.sum(term * factor_l, 0)
                    if HAS_UPPER:
                        total_u = total_u * scale + tl.sum(term * factor_u, 0)
                shift = largest
            if HAS_EDGES:
                beside = tl.where(at == top, 0.0, p)
                if HAS_BUCKET:
                    beside = tl.where(at == num_classes - 1, 0.0, beside)
                gap_l += tl.sum(lower * p_gap, 0)
                p_l += tl.sum(lower * beside, 0)
                if HAS_UPPER:
                    gap_u += tl.sum(upper * p_gap, 0)
                    p_u += tl.sum(upper * beside, 0)
                    dense_l += tl.sum(density_l * beside, 0)
                    above = (high - lp) * softness_inverse - _UPPER_EDGE
                    e = tl.exp(tl.minimum(tl.maximum(above, -80.0 * F), 80.0 * F))
                    over = 1.0 / (1.0 + e)
                    dense_u += tl.sum(e * over * over * beside, 0)
        elif FORMULA is not None:
            value, slope = _divergence(lp, lq, share, shares + token, FORMULA, F)
            value_sum += tl.sum(tl.where(is_class, value, 0.0), 0)
            slope_sum += tl.sum(tl.where(is_class, slope, 0.0), 0)
    out += token * NUM_SUMS
    tl.store(out + _KL, kl)
    if IS_CLIPPED:
        tl.store(out + _KEPT_GAP, kept_gap)
        tl.store(out + _KEPT_P, kept_p)
        tl.store(out + _CLIPPED_P, clipped_p)
        tl.store(out + _CLASSES, classes)
        if HAS_TOTALS:
            tl.store(out + _SHIFT, shift)
            tl.store(out + _TOTAL, total)
            if HAS_EDGES:
                tl.store(out + _TOTAL_L, total_l)
                tl.store(out + _TOTAL_U, total_u)
        if HAS_EDGES:
            tl.store(out + _GAP_L, gap_l)
            tl.store(out + _P_L, p_l)
            tl.store(out + _GAP_U, gap_u)
            tl.store(out + _P_U, p_u)
            tl.store(out + _DENSITY_L, dense_l)
            tl.store(out + _DENSITY_U, dense_u)
    elif FORMULA is not None:
        tl.store(out + _VALUE, value_sum)
        tl.store(out + _SLOPE, slope_sum)


@triton.jit
def _factor(tile, largest, log_sum, token, at, is_class, stride, inverse: tl.constexpr, F: tl.constexpr):
    """A token's probabilities as factors of a span's product."""
    gap = tl.load(tile + token * stride + at, mask=is_class, other=0.0) - tl.load(largest + token)
    return tl.where(is_class, floored_exp(gap * inverse - tl.load(log_sum + token), 20.0 * F), 0.0)


@triton.jit
def span_sums_kernel(
    student, teacher, student_max, student_log, teacher_max, teacher_log, out, num_classes, stride,
    inverse: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """See ``tile_span.span_sums``."""
    token = tl.program_id(0).to(tl.int64)
    square, inner = tl.load(student_log + token) * 0.0, tl.load(student_log + token) * 0.0
    for start in range(0, num_classes, BLOCK):
        at = start + tl.arange(0, BLOCK)
        is_class = at < num_classes
        r_s = _factor(student, student_max, student_log, token, at, is_class, stride, inverse, F)
        r_s *= _factor(student, student_max, student_log, token + 1, at, is_class, stride, inverse, F)
        r_t = _factor(teacher, teacher_max, teacher_log, token, at, is_class, stride, inverse, F)
        r_t *= _factor(teacher, teacher_max, teacher_log, token + 1, at, is_class, stride, inverse, F)
        difference = tl.where(is_class, r_s - r_t, 0.0)
        square += tl.sum(difference * difference, 0)
        inner += tl.sum(difference * r_s, 0)
    tl.store(out + token * _NUM_SPAN_SUMS + _SQUARE, square)
    tl.store(out + token * _NUM_SPAN_SUMS + _INNER, inner)


@triton.jit
def gradient_kernel(
    student, teacher, student_max, student_log, untempered_log, teacher_max, teacher_log, shares, theta_l, theta_u,
    top_column, w_student, w_teacher, w_bucket, log_norm, w_untempered, w_label, label_column, span_pair, span_inner,
    out, num_tokens, num_classes, stride, stride_out,
    inverse: tl.constexpr, softness_inverse: tl.constexpr, share: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
    IS_CLIPPED: tl.constexpr, FORMULA: tl.constexpr, IS_BUCKET: tl.constexpr, IS_NONE: tl.constexpr,
    HAS_TOTALS: tl.constexpr, HAS_UPPER: tl.constexpr, HAS_BUCKET: tl.constexpr, HAS_TOKEN: tl.constexpr,
    HAS_UNTEMPERED: tl.constexpr, HAS_LABEL: tl.constexpr, HAS_SPAN: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    """See ``tile_math.gradient``; with the label and span parts, and added to ``out`` where ``ADDS``."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_class = at < num_classes
    # Beyond the last class any finite number is fine: nothing is stored there.
    gap = tl.load(student + token * stride + at, mask=is_class, other=0.0) - tl.load(student_max + token)
    gap = tl.where(is_class, gap, 0.0)
    lq = gap * inverse - tl.load(student_log + token)
    result = tl.load(w_student + token) * floored_exp(lq, 41.0 * F)
    if HAS_UNTEMPERED:
        result += tl.load(w_untempered + token) * floored_exp(gap - tl.load(untempered_log + token), 41.0 * F)
    if HAS_TOKEN:
        gap_t = tl.load(teacher + token * stride + at, mask=is_class, other=0.0) - tl.load(teacher_max + token)
        lp = tl.where(is_class, gap_t, 0.0) * inverse - tl.load(teacher_log + token)
        factor_t = tl.load(w_teacher + token)
        if IS_CLIPPED:
            low, high, top = tl.load(theta_l + token), tl.load(theta_u + token), tl.load(top_column + token)
            near, far, is_lower = edges(
                lp, low, high, at, top, num_classes - 1, softness_inverse, HAS_BUCKET, HAS_UPPER, IS_NONE
            )
            kept, clipped, log_weight, factor, lower, upper, factor_l, factor_u, density_l = soft_mask(
                near, far, is_lower, at == top, IS_BUCKET, HAS_UPPER, IS_NONE, F
            )
            result -= factor_t * kept * floored_exp(lp, 41.0 * F)
            if HAS_TOTALS:
                bucket = floored_exp(lq + log_weight - tl.load(log_norm + token), 41.0 * F) * factor
                result += tl.load(w_bucket + token) * bucket
        elif FORMULA is None:
            result -= factor_t * floored_exp(lp, 41.0 * F)
        else:
            value, slope = _divergence(lp, lq, share, shares + token, FORMULA, F)
            result += factor_t * slope
    if HAS_SPAN:
        q = floored_exp(lq, 20.0 * F)
        p = _factor(teacher, teacher_max, teacher_log, token, at, is_class, stride, inverse, F)
        # The pair that the token starts (its weight is 0 for the last token), and the one that it ends.
        after = tl.minimum(token + 1, num_tokens - 1)
        r_s = q * _factor(student, student_max, student_log, after, at, is_class, stride, inverse, F)
        r_t = p * _factor(teacher, teacher_max, teacher_log, after, at, is_class, stride, inverse, F)
        result += tl.load(span_pair + token) * ((r_s - r_t) * r_s - tl.load(span_inner + token) * q)
        before = tl.maximum(token - 1, 0)
        weight = tl.where(token > 0, tl.load(span_pair + before), 0.0)
        r_s = q * _factor(student, student_max, student_log, before, at, is_class, stride, inverse, F)
        r_t = p * _factor(teacher, teacher_max, teacher_log, before, at, is_class, stride, inverse, F)
        result += weight * ((r_s - r_t) * r_s - tl.load(span_inner + before) * q)
    if HAS_LABEL:
        result -= tl.where(at == tl.load(label_column + token), tl.load(w_label + token), 0.0)
    out += token * stride_out + at
    if ADDS:
        result += tl.load(out, mask=is_class, other=0.0)
    tl.store(out, result.to(out.dtype.element_ty), mask=is_class)
