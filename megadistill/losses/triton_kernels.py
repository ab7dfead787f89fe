"""The row kernels in Triton: `rowmath` in three passes over tiles that are too large for any cache.

statistics: one program a row; sums: one program a row, with running maxima for the log-domain sums; gradient: one program
a row and block of classes, span and label included, written once in the dtype that the next product reads. The formulas
are those of `rowmath`, where they are explained. On a machine without CUDA, TRITON_INTERPRET=1 runs them (slowly) on the
CPU: that is how they are tested there.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megadistill.losses.backends import CompiledKernels
from megadistill.losses.tiles import LocalStatistics, RowConstants, RowWeights, TileSpec, group_width

_KINDS = {
    "clipped": 0,
    "forward_kl": 1,
    "reverse_kl": 2,
    "skewed_forward_kl": 3,
    "skewed_reverse_kl": 4,
    "jensen_shannon": 5,
    "total_variation": 6,
}
_BLOCK = 1024  # classes that a program works on at a time
_NUM_WARPS = 4


@triton.jit
def _exp(values, FLOOR: tl.constexpr):
    return tl.exp(tl.maximum(values, -FLOOR))


@triton.jit
def _statistics_kernel(
    student, teacher, student_max, student_sum, plain_sum, teacher_max, teacher_sum, group_max, group_sum,
    num_classes, num_groups, stride,
    inverse: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_PLAIN: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    top_s = tl.load(student + row * stride)
    sum_s, sum_plain = top_s * 0.0, top_s * 0.0
    top_t, sum_t = top_s, sum_s
    if HAS_TEACHER:
        top_t = tl.load(teacher + row * stride)
    for start in range(0, num_classes, BLOCK):
        is_class = start + columns < num_classes
        x = tl.load(student + row * stride + start + columns, mask=is_class, other=float("-inf"))
        largest = tl.maximum(top_s, tl.max(x, 0))
        sum_s = sum_s * tl.exp((top_s - largest) * inverse) + tl.sum(tl.exp((x - largest) * inverse), 0)
        if HAS_PLAIN:
            sum_plain = sum_plain * tl.exp(top_s - largest) + tl.sum(tl.exp(x - largest), 0)
        top_s = largest
        if HAS_TEACHER:
            x = tl.load(teacher + row * stride + start + columns, mask=is_class, other=float("-inf"))
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
                tl.store(group_max + row * num_groups + group, maxima, mask=group < num_groups)
                tl.store(group_sum + row * num_groups + group, totals, mask=group < num_groups)
    tl.store(student_max + row, top_s)
    tl.store(student_sum + row, sum_s)
    if HAS_PLAIN:
        tl.store(plain_sum + row, sum_plain)
    if HAS_TEACHER:
        tl.store(teacher_max + row, top_t)
        tl.store(teacher_sum + row, sum_t)


@triton.jit
def _edges(
    lp, theta_l, theta_u, columns, top_column, last_column, softness_inverse: tl.constexpr, HAS_BUCKET: tl.constexpr
):
    lower, upper = (lp - theta_l) * softness_inverse, (theta_u - lp) * softness_inverse
    near, far = tl.minimum(lower, upper), tl.maximum(lower, upper)
    near, far = tl.where(columns == top_column, 1e12, near), tl.where(columns == top_column, 1e12, far)
    if HAS_BUCKET:
        near, far = tl.where(columns == last_column, -1e12, near), tl.where(columns == last_column, 1e12, far)
    return near, far, lower < upper


@triton.jit
def _mask(near, far, IS_BUCKET: tl.constexpr, F: tl.constexpr):
    """kept, clipped, near_clipped, far_clipped, log_weight, factor, factor_near, factor_far."""
    log_weight = tl.minimum(-near if IS_BUCKET else near, 0.0)
    e = _exp(-tl.abs(near), 24.0 * F)
    far_relative = _exp(tl.maximum(near, 0.0) - far, 20.0 * F)
    is_inside = near > 0
    r = 1.0 / (1.0 + e)
    er = e * r
    near_kept, near_clipped = tl.where(is_inside, r, er), tl.where(is_inside, er, r)
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
    return kept, clipped, near_clipped, far_clipped, log_weight, factor, factor_near, factor_far


@triton.jit
def _log_mixture(gap, share: tl.constexpr, F: tl.constexpr):
    """log((1 - share) + share exp(gap)); by series where the gap is so small that exp(gap) - 1 would lose digits."""
    gap = tl.minimum(gap, 80.0 * F)
    series = gap * (1.0 + gap * (0.5 + gap * (1.0 / 6.0 + gap * (1.0 / 24.0 + gap * (1.0 / 120.0 + gap / 720.0)))))
    x = share * tl.where(tl.abs(gap) < 0.05, series, tl.exp(gap) - 1.0)
    # log(1 + x) without losing the digits of a small x: the rounding of 1 + x is divided out.
    total = 1.0 + x
    small = total - 1.0
    return tl.where(small == 0.0, x, tl.log(total) * (x / tl.where(small == 0.0, 1.0, small)))


@triton.jit
def _divergence(lp, lq, mix: tl.constexpr, KIND: tl.constexpr, F: tl.constexpr):
    p, q = _exp(lp, 41.0 * F), _exp(lq, 41.0 * F)
    gap = lp - lq
    if KIND == 2:
        value = -q * gap
        slope = value
    elif KIND == 6:
        difference = q - p
        value = 0.5 * tl.abs(difference)
        slope = 0.5 * q * tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, 0.0))
    elif KIND == 3:
        log_mixture = _log_mixture(-gap, 1.0 - mix, F)
        value = -p * log_mixture
        slope = (mix - 1.0) * q * tl.exp(-log_mixture)
    elif KIND == 4:
        log_mixture = _log_mixture(gap, 1.0 - mix, F)
        value = -q * log_mixture
        slope = -q * (log_mixture + mix * tl.exp(-log_mixture))
    else:
        slope = (mix - 1.0) * q * _log_mixture(gap, mix, F)
        value = slope - mix * p * _log_mixture(-gap, 1.0 - mix, F)
    return value, slope


@triton.jit
def _sums_kernel(
    student, teacher, student_max, student_log, teacher_max, teacher_log, theta_l, theta_u, top_column, out,
    num_classes, stride,
    inverse: tl.constexpr, softness_inverse: tl.constexpr, mix: tl.constexpr,
    KIND: tl.constexpr, IS_BUCKET: tl.constexpr, HAS_EDGES: tl.constexpr, HAS_BUCKET: tl.constexpr, F: tl.constexpr,
    NUM_SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    max_s, log_s = tl.load(student_max + row), tl.load(student_log + row)
    max_t, log_t = tl.load(teacher_max + row), tl.load(teacher_log + row)
    zero = log_s * 0.0
    kl, kept_gap, kept_p, clipped_p = zero, zero, zero, zero
    gap_l, p_l, gap_u, p_u = zero, zero, zero, zero
    shift, total, total_l, total_u = zero - float("inf"), zero, zero, zero
    value_sum, slope_sum = zero, zero
    low, high, top = zero, zero, -1
    if KIND == 0:
        low, high, top = tl.load(theta_l + row), tl.load(theta_u + row), tl.load(top_column + row)
    for start in range(0, num_classes, BLOCK):
        at = start + columns
        is_class = at < num_classes
        lq = (tl.load(student + row * stride + at, mask=is_class, other=0.0) - max_s) * inverse - log_s
        lp = (tl.load(teacher + row * stride + at, mask=is_class, other=0.0) - max_t) * inverse - log_t
        # Beyond the last class anything finite will do.
        lq, lp = tl.where(is_class, lq, -1.0), tl.where(is_class, lp, -1.0)
        p = tl.where(is_class, _exp(lp, 41.0 * F), 0.0)
        p_gap = p * (lp - lq)
        kl += tl.sum(p_gap, 0)
        if KIND == 0:
            near, far, is_lower = _edges(lp, low, high, at, top, num_classes - 1, softness_inverse, HAS_BUCKET)
            kept, clipped, near_clipped, far_clipped, log_weight, factor, factor_near, factor_far = _mask(
                near, far, IS_BUCKET, F
            )
            mp, mp_gap = kept * p, kept * p_gap
            kept_gap += tl.sum(mp_gap, 0)
            kept_p += tl.sum(mp, 0)
            clipped_p += tl.sum(clipped * p, 0)
            exponent = lq + log_weight
            largest = tl.maximum(shift, tl.max(tl.where(is_class, exponent, float("-inf")), 0))
            scale = tl.exp(shift - largest)
            term = tl.where(is_class, _exp(exponent - largest, 35.0 * F), 0.0)
            total = total * scale + tl.sum(term * factor, 0)
            if HAS_EDGES:
                below = tl.where(is_lower, near_clipped, far_clipped)
                above = tl.where(is_lower, far_clipped, near_clipped)
                gap_l += tl.sum(below * mp_gap, 0)
                p_l += tl.sum(below * mp, 0)
                gap_u += tl.sum(above * mp_gap, 0)
                p_u += tl.sum(above * mp, 0)
                total_l = total_l * scale + tl.sum(term * tl.where(is_lower, factor_near, factor_far), 0)
                total_u = total_u * scale + tl.sum(term * tl.where(is_lower, factor_far, factor_near), 0)
            shift = largest
        elif KIND > 1:
            value, slope = _divergence(lp, lq, mix, KIND, F)
            value_sum += tl.sum(tl.where(is_class, value, 0.0), 0)
            slope_sum += tl.sum(tl.where(is_class, slope, 0.0), 0)
    out += row * NUM_SUMS
    tl.store(out, kl)
    if KIND == 0:
        tl.store(out + 1, kept_gap)
        tl.store(out + 2, kept_p)
        tl.store(out + 3, clipped_p)
        if HAS_EDGES:
            tl.store(out + 4, gap_l)
            tl.store(out + 5, p_l)
            tl.store(out + 6, gap_u)
            tl.store(out + 7, p_u)
            tl.store(out + 10, total_l)
            tl.store(out + 11, total_u)
        tl.store(out + (8 if HAS_EDGES else 4), shift)
        tl.store(out + (9 if HAS_EDGES else 5), total)
    elif KIND > 1:
        tl.store(out + 1, value_sum)
        tl.store(out + 2, slope_sum)


@triton.jit
def _factor(tile, largest, log_sum, row, at, is_class, stride, inverse: tl.constexpr, F: tl.constexpr):
    """A row's probabilities as factors of a span's product."""
    gap = tl.load(tile + row * stride + at, mask=is_class, other=0.0) - tl.load(largest + row)
    return tl.where(is_class, _exp(gap * inverse - tl.load(log_sum + row), 20.0 * F), 0.0)


@triton.jit
def _span_sums_kernel(
    student, teacher, student_max, student_log, teacher_max, teacher_log, out, num_classes, stride,
    inverse: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    square, inner = tl.load(student_log + row) * 0.0, tl.load(student_log + row) * 0.0
    for start in range(0, num_classes, BLOCK):
        at = start + tl.arange(0, BLOCK)
        is_class = at < num_classes
        r_s = _factor(student, student_max, student_log, row, at, is_class, stride, inverse, F)
        r_s *= _factor(student, student_max, student_log, row + 1, at, is_class, stride, inverse, F)
        r_t = _factor(teacher, teacher_max, teacher_log, row, at, is_class, stride, inverse, F)
        r_t *= _factor(teacher, teacher_max, teacher_log, row + 1, at, is_class, stride, inverse, F)
        difference = tl.where(is_class, r_s - r_t, 0.0)
        square += tl.sum(difference * difference, 0)
        inner += tl.sum(difference * r_s, 0)
    tl.store(out + row * 2, square)
    tl.store(out + row * 2 + 1, inner)


@triton.jit
def _gradient_kernel(
    student, teacher, student_max, student_log, plain_log, teacher_max, teacher_log, theta_l, theta_u, top_column,
    w_student, w_teacher, w_share, log_norm, w_plain, w_label, label_column, span_pair, span_inner, out,
    num_rows, num_classes, stride, stride_out,
    inverse: tl.constexpr, softness_inverse: tl.constexpr, mix: tl.constexpr,
    KIND: tl.constexpr, IS_BUCKET: tl.constexpr, HAS_BUCKET: tl.constexpr, HAS_TOKEN: tl.constexpr,
    HAS_PLAIN: tl.constexpr, HAS_LABEL: tl.constexpr, HAS_SPAN: tl.constexpr, ADDS: tl.constexpr, F: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_class = at < num_classes
    # Beyond the last class anything finite will do: nothing is stored there.
    gap = tl.load(student + row * stride + at, mask=is_class, other=0.0) - tl.load(student_max + row)
    gap = tl.where(is_class, gap, 0.0)
    lq = gap * inverse - tl.load(student_log + row)
    result = tl.load(w_student + row) * _exp(lq, 41.0 * F)
    if HAS_PLAIN:
        result += tl.load(w_plain + row) * _exp(gap - tl.load(plain_log + row), 41.0 * F)
    if HAS_TOKEN:
        gap_t = tl.load(teacher + row * stride + at, mask=is_class, other=0.0) - tl.load(teacher_max + row)
        lp = tl.where(is_class, gap_t, 0.0) * inverse - tl.load(teacher_log + row)
        factor_t = tl.load(w_teacher + row)
        if KIND == 0:
            near, far, is_lower = _edges(
                lp, tl.load(theta_l + row), tl.load(theta_u + row), at, tl.load(top_column + row), num_classes - 1,
                softness_inverse, HAS_BUCKET,
            )  # fmt: skip
            kept, clipped, near_clipped, far_clipped, log_weight, factor, factor_near, factor_far = _mask(
                near, far, IS_BUCKET, F
            )
            share = _exp(lq + log_weight - tl.load(log_norm + row), 41.0 * F) * factor
            result += tl.load(w_share + row) * share - factor_t * kept * _exp(lp, 41.0 * F)
        elif KIND == 1:
            result -= factor_t * _exp(lp, 41.0 * F)
        else:
            value, slope = _divergence(lp, lq, mix, KIND, F)
            result += factor_t * slope
    if HAS_SPAN:
        q = _exp(lq, 20.0 * F)
        p = _factor(teacher, teacher_max, teacher_log, row, at, is_class, stride, inverse, F)
        # The pair that the row starts (its weight is 0 in the last row), and the one that it ends.
        after = tl.minimum(row + 1, num_rows - 1)
        weight = tl.load(span_pair + row)
        r_s = q * _factor(student, student_max, student_log, after, at, is_class, stride, inverse, F)
        r_t = p * _factor(teacher, teacher_max, teacher_log, after, at, is_class, stride, inverse, F)
        result += weight * ((r_s - r_t) * r_s - tl.load(span_inner + row) * q)
        before = tl.maximum(row - 1, 0)
        weight = tl.where(row > 0, tl.load(span_pair + before), 0.0)
        r_s = q * _factor(student, student_max, student_log, before, at, is_class, stride, inverse, F)
        r_t = p * _factor(teacher, teacher_max, teacher_log, before, at, is_class, stride, inverse, F)
        result += weight * ((r_s - r_t) * r_s - tl.load(span_inner + before) * q)
    if HAS_LABEL:
        result -= tl.where(at == tl.load(label_column + row), tl.load(w_label + row), 0.0)
    out += row * stride_out + at
    if ADDS:
        result += tl.load(out, mask=is_class, other=0.0)
    tl.store(out, result.to(out.dtype.element_ty), mask=is_class)


class TritonKernels(CompiledKernels):
    """The kernels above behind the interface of `TorchKernels`. Tiles have unit stride along the classes."""

    def statistics(self, spec: TileSpec, student_CV: Tensor, teacher_CV: Tensor | None) -> LocalStatistics:
        num_rows, num_classes = student_CV.shape
        row = student_CV.new_empty(num_rows)
        width = 1 if teacher_CV is None else group_width(num_classes)
        num_groups = -(-num_classes // width) if width > 1 else 0
        groups = [student_CV.new_empty(num_rows, num_groups) if num_groups else None for _ in range(2)]
        plain = torch.empty_like(row) if spec.has_plain else None
        found = [torch.empty_like(row) for _ in range(2 if teacher_CV is None else 4)]
        student, teacher = found[:2], found[2:] or [None, None]
        _statistics_kernel[(num_rows,)](
            student_CV, row if teacher_CV is None else teacher_CV, *student, _or(plain, row), *(_or(t, row) for t in teacher),
            *(_or(group, row) for group in groups), num_classes, num_groups, student_CV.stride(0),
            1.0 / spec.temperature, HAS_TEACHER=teacher_CV is not None, HAS_PLAIN=spec.has_plain, WIDTH=width,
            BLOCK=_BLOCK, num_warps=_NUM_WARPS,
        )  # fmt: skip
        return LocalStatistics(student[0], student[1], plain, teacher[0], teacher[1], groups[0], groups[1])

    def sums(self, spec: TileSpec, student_CV: Tensor, teacher_CV: Tensor, rows: RowConstants) -> Tensor:
        num_rows, num_classes = student_CV.shape
        out = student_CV.new_empty(num_rows, spec.num_sums)
        _sums_kernel[(num_rows,)](
            student_CV, teacher_CV, *_models(rows), *_thresholds(rows), out, num_classes, student_CV.stride(0),
            1.0 / spec.temperature, _inverse(spec.softness), spec.mix, KIND=_KINDS[spec.kind],
            IS_BUCKET=spec.remainder == "bucket", HAS_EDGES=spec.has_edges, HAS_BUCKET=spec.has_bucket,
            F=_floors(student_CV), NUM_SUMS=spec.num_sums, BLOCK=_BLOCK, num_warps=_NUM_WARPS,
        )  # fmt: skip
        return out

    def span_sums(self, spec: TileSpec, student_CV: Tensor, teacher_CV: Tensor, rows: RowConstants) -> Tensor:
        num_rows, num_classes = student_CV.shape
        out = student_CV.new_empty(num_rows - 1, 2)
        _span_sums_kernel[(num_rows - 1,)](
            student_CV, teacher_CV, *_models(rows), out, num_classes, student_CV.stride(0), 1.0 / spec.temperature,
            F=_floors(student_CV), BLOCK=_BLOCK, num_warps=_NUM_WARPS,
        )  # fmt: skip
        return out

    def gradient(
        self,
        spec: TileSpec,
        student_CV: Tensor,
        teacher_CV: Tensor | None,
        rows: RowConstants,
        weights: RowWeights,
        out_CV: Tensor,
    ) -> None:
        self._gradient(spec, student_CV, teacher_CV, rows, weights, out_CV, adds=False)

    def add_span(
        self,
        spec: TileSpec,
        student_CV: Tensor,
        teacher_CV: Tensor,
        rows: RowConstants,
        weights: RowWeights,
        out_CV: Tensor,
    ) -> None:
        if weights.span_pair is None:
            return
        only_span = RowWeights(
            torch.zeros_like(weights.student), span_pair=weights.span_pair, span_inner=weights.span_inner
        )
        self._gradient(spec, student_CV, teacher_CV, rows, only_span, out_CV, adds=True)

    def gradient_dtype(self, factor: torch.dtype, total: torch.dtype) -> torch.dtype:
        return factor

    def _gradient(
        self,
        spec: TileSpec,
        student_CV: Tensor,
        teacher_CV: Tensor | None,
        rows: RowConstants,
        weights: RowWeights,
        out_CV: Tensor,
        *,
        adds: bool,
    ) -> None:
        num_rows, num_classes = student_CV.shape
        any_row, models = rows.student_max, _models(rows)
        has_span = weights.span_pair is not None and teacher_CV is not None
        _gradient_kernel[(num_rows, triton.cdiv(num_classes, _BLOCK))](
            student_CV, student_CV if teacher_CV is None else teacher_CV, *models[:2], _or(rows.plain_log, any_row),
            *models[2:], *_thresholds(rows),
            *(_or(part, any_row) for part in weights), out_CV, num_rows, num_classes, student_CV.stride(0),
            out_CV.stride(0), 1.0 / spec.temperature, _inverse(spec.softness), spec.mix, KIND=_KINDS[spec.kind],
            IS_BUCKET=spec.remainder == "bucket", HAS_BUCKET=spec.has_bucket,
            HAS_TOKEN=weights.teacher is not None and teacher_CV is not None, HAS_PLAIN=weights.plain is not None,
            HAS_LABEL=weights.label is not None, HAS_SPAN=has_span, ADDS=adds, F=_floors(student_CV), BLOCK=_BLOCK,
            num_warps=_NUM_WARPS,
        )  # fmt: skip


def _models(rows: RowConstants) -> tuple[Tensor, ...]:
    parts = (rows.student_max, rows.student_log, rows.teacher_max, rows.teacher_log)
    return tuple(_or(part, rows.student_max) for part in parts)


def _thresholds(rows: RowConstants) -> tuple[Any, ...]:
    """theta_l, theta_u, top_column, or any row where the kernel does not read them."""
    return tuple(_or(part, rows.student_max) for part in (rows.theta_l, rows.theta_u, rows.top_column))


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A pointer is needed even for what is not read; what is read lies without gaps."""
    return stand_in if tensor is None else tensor.contiguous()


def _inverse(softness: float) -> float:
    return 1.0 / softness if softness else 1.0


def _floors(tile: Tensor) -> float:
    """Factor of the floors of `rowmath`: float64 has eight times the exponents."""
    return 8.0 if tile.dtype == torch.float64 else 1.0
