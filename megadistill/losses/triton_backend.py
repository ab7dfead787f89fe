"""The Triton kernels behind the interface of `TorchKernels`.

On a machine without CUDA, TRITON_INTERPRET=1 runs them (slowly) on the CPU: that is how they are tested there.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
import triton
from torch import Tensor

from megadistill.losses import triton_kernels as kernels
from megadistill.losses.backends import CompiledKernels
from megadistill.losses.tiles import Kind, LocalStatistics, RowConstants, RowWeights, TileSpec, group_width

# The number of each kind in the kernels.
_KINDS = {kind: number for number, kind in enumerate(get_args(Kind))}
_BLOCK = 1024  # classes that a program works on at a time
_NUM_WARPS = 4


class TritonKernels(CompiledKernels):
    """Tiles have unit stride along the classes."""

    def statistics(self, spec: TileSpec, student_CV: Tensor, teacher_CV: Tensor | None) -> LocalStatistics:
        num_rows, num_classes = student_CV.shape
        row = student_CV.new_empty(num_rows)
        width = 1 if teacher_CV is None else group_width(num_classes)
        num_groups = -(-num_classes // width) if width > 1 else 0
        groups = [student_CV.new_empty(num_rows, num_groups) if num_groups else None for _ in range(2)]
        plain = torch.empty_like(row) if spec.has_plain else None
        maxima, totals, of_teacher_max, of_teacher_sum = (torch.empty_like(row) for _ in range(4))
        kernels.statistics_kernel[(num_rows,)](
            student_CV, row if teacher_CV is None else teacher_CV, maxima, totals, _or(plain, row), of_teacher_max,
            of_teacher_sum, *(_or(group, row) for group in groups), num_classes, num_groups, student_CV.stride(0),
            1.0 / spec.temperature, HAS_TEACHER=teacher_CV is not None, HAS_PLAIN=spec.has_plain, WIDTH=width,
            BLOCK=_BLOCK, num_warps=_NUM_WARPS,
        )  # fmt: skip
        if teacher_CV is None:
            return LocalStatistics(maxima, totals, plain, None, None, None, None)
        return LocalStatistics(maxima, totals, plain, of_teacher_max, of_teacher_sum, *groups)

    def sums(self, spec: TileSpec, student_CV: Tensor, teacher_CV: Tensor, rows: RowConstants) -> Tensor:
        num_rows, num_classes = student_CV.shape
        out = student_CV.new_empty(num_rows, spec.num_sums)
        kernels.sums_kernel[(num_rows,)](
            student_CV, teacher_CV, *_models(rows), *_thresholds(rows), out, num_classes, student_CV.stride(0),
            1.0 / spec.temperature, _inverse(spec.softness), spec.mix, KIND=_KINDS[spec.kind],
            IS_BUCKET=spec.remainder == "bucket", HAS_EDGES=spec.has_edges, HAS_BUCKET=spec.has_bucket,
            F=_floors(student_CV), NUM_SUMS=spec.num_sums, BLOCK=_BLOCK, num_warps=_NUM_WARPS,
        )  # fmt: skip
        return out

    def span_sums(self, spec: TileSpec, student_CV: Tensor, teacher_CV: Tensor, rows: RowConstants) -> Tensor:
        num_rows, num_classes = student_CV.shape
        out = student_CV.new_empty(num_rows - 1, 2)
        kernels.span_sums_kernel[(num_rows - 1,)](
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
        adds: bool = False,
    ) -> None:
        """Writes the whole derivative in one pass, or adds it to `out_CV`."""
        num_rows, num_classes = student_CV.shape
        any_row, models = rows.student_max, _models(rows)
        has_span = weights.span_pair is not None and teacher_CV is not None
        kernels.gradient_kernel[(num_rows, triton.cdiv(num_classes, _BLOCK))](
            student_CV, student_CV if teacher_CV is None else teacher_CV, *models[:2], _or(rows.plain_log, any_row),
            *models[2:], *_thresholds(rows),
            *(_or(part, any_row) for part in weights), out_CV, num_rows, num_classes, student_CV.stride(0),
            out_CV.stride(0), 1.0 / spec.temperature, _inverse(spec.softness), spec.mix, KIND=_KINDS[spec.kind],
            IS_BUCKET=spec.remainder == "bucket", HAS_BUCKET=spec.has_bucket,
            HAS_TOKEN=weights.teacher is not None and teacher_CV is not None, HAS_PLAIN=weights.plain is not None,
            HAS_LABEL=weights.label is not None, HAS_SPAN=has_span, ADDS=adds, F=_floors(student_CV), BLOCK=_BLOCK,
            num_warps=_NUM_WARPS,
        )  # fmt: skip

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
        self.gradient(spec, student_CV, teacher_CV, rows, only_span, out_CV, adds=True)

    def gradient_dtype(self, factor: torch.dtype, total: torch.dtype) -> torch.dtype:
        return factor


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
