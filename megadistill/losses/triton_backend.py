"""The Triton kernels behind the interface of ``TorchKernels``.

On a machine without CUDA, TRITON_INTERPRET=1 runs them (slowly) on the CPU, for tests.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from megadistill.losses import triton_kernels as kernels
from megadistill.losses.divergences import Setting
from megadistill.losses.tiles import (
    ClippedSum,
    EdgeNodes,
    GradientWeights,
    LocalStatistics,
    LogNormalizers,
    MaskBounds,
    SpanPairs,
    SpanSum,
    TileSpec,
    group_width,
)
from megadistill.losses.torch_kernels import TorchKernels
from megadistill.losses.triton_mask import edge_masses_kernel

_BLOCK = 1024  # classes that a program works on at a time
_NUM_WARPS = 4


class TritonKernels(TorchKernels):
    """Triton on tiles with unit stride along the classes."""

    def statistics(self, spec: TileSpec, student_CVs: Tensor, teacher_CVs: Tensor | None) -> LocalStatistics:
        """See ``tile_math.statistics``."""
        num_tokens, num_classes = student_CVs.shape
        unread = student_CVs.new_empty(num_tokens)
        width = 1 if teacher_CVs is None else group_width(num_classes)
        num_groups = -(-num_classes // width) if width > 1 else 0
        groups = [student_CVs.new_empty(num_tokens, num_groups) if num_groups else None for _ in range(2)]
        untempered = torch.empty_like(unread) if spec.has_untempered else None
        student_max, student_sum, teacher_max, teacher_sum = (torch.empty_like(unread) for _ in range(4))
        kernels.statistics_kernel[(num_tokens,)](
            student_CVs, unread if teacher_CVs is None else teacher_CVs, student_max, student_sum,
            _or(untempered, unread), teacher_max, teacher_sum, *(_or(group, unread) for group in groups), num_classes,
            num_groups, student_CVs.stride(0), 1.0 / spec.temperature, HAS_TEACHER=teacher_CVs is not None,
            HAS_UNTEMPERED=spec.has_untempered, WIDTH=width, BLOCK=_BLOCK, num_warps=_NUM_WARPS,
        )  # fmt: skip
        if teacher_CVs is None:
            return LocalStatistics(student_max, student_sum, untempered, None, None, None, None)
        return LocalStatistics(student_max, student_sum, untempered, teacher_max, teacher_sum, *groups)

    def sums(
        self,
        spec: TileSpec,
        student_CVs: Tensor,
        teacher_CVs: Tensor,
        norms: LogNormalizers,
        bounds: MaskBounds | None,
    ) -> Tensor:
        """See ``tile_math.sums``."""
        num_tokens, num_classes = student_CVs.shape
        num_sums = len(ClippedSum) if spec.is_clipped else spec.num_sums
        out = student_CVs.new_empty(num_tokens, num_sums)
        kernels.sums_kernel[(num_tokens,)](
            student_CVs, teacher_CVs, *_normalizers(norms), _or(norms.share, norms.student_max),
            *_bounds(bounds, norms), out, num_classes, student_CVs.stride(0), 1.0 / spec.temperature,
            _inverse(spec.softness), _share(spec, norms),
            IS_CLIPPED=spec.is_clipped, FORMULA=kernels.triton_formula(spec.formula),
            IS_BUCKET=spec.remainder == "bucket", IS_TRUNCATE=spec.remainder == "truncate",
            IS_NONE=spec.remainder == "none", HAS_TOTALS=spec.has_totals, HAS_UPPER=spec.has_upper,
            HAS_EDGES=spec.has_edges, HAS_BUCKET=spec.has_bucket, F=_floors(student_CVs), NUM_SUMS=num_sums,
            BLOCK=_BLOCK, num_warps=_NUM_WARPS,
        )  # fmt: skip
        return out[:, list(spec.columns)] if spec.is_clipped else out

    def edge_masses(
        self, spec: TileSpec, teacher_CVs: Tensor, norms: LogNormalizers, top_column: Tensor, nodes: EdgeNodes
    ) -> Tensor:
        """See ``tile_math.edge_masses``."""
        num_tokens, num_classes = teacher_CVs.shape
        num_nodes = nodes.lower.shape[1]
        out = teacher_CVs.new_empty(num_tokens, num_nodes * (1 if nodes.upper is None else 2))
        edge_masses_kernel[(num_tokens,)](
            teacher_CVs, *_normalizers(norms)[2:], top_column.contiguous(), nodes.lower.contiguous(),
            _or(nodes.upper, nodes.lower), out, num_classes, teacher_CVs.stride(0), num_nodes, 1.0 / spec.temperature,
            _inverse(spec.softness), IS_WIDE=spec.is_wide, HAS_UPPER=nodes.upper is not None,
            HAS_BUCKET=spec.has_bucket, F=_floors(teacher_CVs), NODES=triton.next_power_of_2(num_nodes),
            BLOCK=_BLOCK // 4, num_warps=_NUM_WARPS,
        )  # fmt: skip
        return out

    def span_sums(
        self, spec: TileSpec, student_CVs: Tensor, teacher_CVs: Tensor, norms: LogNormalizers, pairs: SpanPairs
    ) -> Tensor:
        """See ``tile_span.span_sums``."""
        num_tokens, num_classes = student_CVs.shape
        out = student_CVs.new_empty(num_tokens - 1, len(SpanSum))
        kernels.span_sums_kernel[(num_tokens - 1,)](
            student_CVs, teacher_CVs, *_normalizers(norms), out, num_classes, student_CVs.stride(0),
            1.0 / spec.temperature, F=_floors(student_CVs), BLOCK=_BLOCK, num_warps=_NUM_WARPS,
        )  # fmt: skip
        return out

    def gradient(
        self,
        spec: TileSpec,
        student_CVs: Tensor,
        teacher_CVs: Tensor | None,
        norms: LogNormalizers,
        bounds: MaskBounds | None,
        weights: GradientWeights,
        out_CVs: Tensor,
        pairs: SpanPairs | None = None,
        adds: bool = False,
    ) -> None:
        """Writes the whole derivative in one pass, or adds it to ``out_CVs``."""
        num_tokens, num_classes = student_CVs.shape
        unread, normalizers = norms.student_max, _normalizers(norms)
        has_teacher = teacher_CVs is not None
        kernels.gradient_kernel[(num_tokens, triton.cdiv(num_classes, _BLOCK))](
            student_CVs, student_CVs if teacher_CVs is None else teacher_CVs, *normalizers[:2],
            _or(norms.untempered_log, unread), *normalizers[2:], _or(norms.share, unread), *_bounds(bounds, norms),
            *(_or(part, unread) for part in weights), out_CVs, num_tokens, num_classes, student_CVs.stride(0),
            out_CVs.stride(0), 1.0 / spec.temperature, _inverse(spec.softness), _share(spec, norms),
            IS_CLIPPED=spec.is_clipped, FORMULA=kernels.triton_formula(spec.formula),
            IS_BUCKET=spec.remainder == "bucket", IS_NONE=spec.remainder == "none", HAS_TOTALS=spec.has_totals,
            HAS_UPPER=spec.has_upper, HAS_BUCKET=spec.has_bucket,
            HAS_TOKEN=weights.teacher is not None and has_teacher, HAS_UNTEMPERED=weights.untempered is not None,
            HAS_LABEL=weights.label is not None, HAS_SPAN=weights.span_pair is not None and has_teacher, ADDS=adds,
            F=_floors(student_CVs), BLOCK=_BLOCK, num_warps=_NUM_WARPS,
        )  # fmt: skip

    def add_span(
        self,
        spec: TileSpec,
        student_CVs: Tensor,
        teacher_CVs: Tensor,
        norms: LogNormalizers,
        weights: GradientWeights,
        out_CVs: Tensor,
    ) -> None:
        """Adds the span part of the derivative, where there is one."""
        if weights.span_pair is None:
            return
        only_span = GradientWeights(
            torch.zeros_like(weights.student), span_pair=weights.span_pair, span_inner=weights.span_inner
        )
        self.gradient(spec, student_CVs, teacher_CVs, norms, None, only_span, out_CVs, adds=True)

    def gradient_dtype(self, factor: torch.dtype, total: torch.dtype) -> torch.dtype:
        """The dtype that the products read."""
        return factor


def _normalizers(norms: LogNormalizers) -> tuple[Tensor, ...]:
    parts = (norms.student_max, norms.student_log, norms.teacher_max, norms.teacher_log)
    return tuple(_or(part, norms.student_max) for part in parts)


def _bounds(bounds: MaskBounds | None, norms: LogNormalizers) -> tuple[Tensor, ...]:
    """The mask's thresholds and top column, or anything where the kernel does not read them."""
    if bounds is None:
        return (norms.student_max,) * len(MaskBounds._fields)
    return tuple(part.contiguous() for part in bounds)


def _or(tensor: Tensor | None, unread: Tensor) -> Tensor:
    """A contiguous tensor; ``unread`` for None, because a kernel needs a pointer even for what it does not read."""
    return unread if tensor is None else tensor.contiguous()


def _share(spec: TileSpec, norms: LogNormalizers) -> Setting | None:
    """The share that all tokens have; None: each has its own."""
    return spec.share if norms.share is None else None


def _inverse(softness: float) -> float:
    return 1.0 / softness if softness else 1.0


def _floors(tile: Tensor) -> float:
    """Factor of the floors of ``tile_math``: float64 has eight times the exponents."""
    return 8.0 if tile.dtype == torch.float64 else 1.0
