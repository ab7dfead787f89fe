"""The usual teacher of the objective: hidden states and a head shard, so a tile of logits beside the student's.

Suffixes: C tokens of one chunk, Vs this rank's classes, R ranks.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megadistill.losses.head import LogitsProjector
from megadistill.losses.statistics import TokenStatistics, merge_both
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
)
from megadistill.losses.torch_kernels import TorchKernels
from megadistill.parallel.collectives import all_gather_rows
from megadistill.parallel.vocab import VocabShard


class DenseTeacher:
    """The teacher's logits of one chunk at a time, and what the kernels compute from them and the student's.

    Args:
        projector: The teacher's logits.
        spec: What the kernels are specialized on.
        kernels: The backend.
        shard: This rank's slice of the vocabulary.
        top_k: Number of top log-probabilities to merge; 0: none.
        max_tokens: Tokens of the longest chunk.
        has_label_p: The teacher's probability of the labels is wanted.
        interpolation: The teacher's share t of its logits; the student's make up the rest.
    """

    def __init__(
        self,
        projector: LogitsProjector,
        spec: TileSpec,
        kernels: TorchKernels,
        shard: VocabShard,
        top_k: int,
        max_tokens: int,
        has_label_p: bool = False,
        interpolation: float = 1.0,
    ) -> None:
        self.spec, self.kernels, self.shard, self.top_k, self._has_label_p = spec, kernels, shard, top_k, has_label_p
        self._interpolation = interpolation
        self._projector = projector
        self._logits_buffer = projector.new_buffer(max_tokens)
        self.tile_CVs = self._logits_buffer
        self._pairs: SpanPairs | None = None

    def statistics(self, chunk: slice, student_CVs: Tensor, labels: Tensor) -> TokenStatistics:
        """Reads a chunk: its tile, and the merged statistics of both models (one all-gather)."""
        self.tile_CVs = self._projector.logits(chunk, self._logits_buffer)
        if self._interpolation < 1:  # a tile like the teacher's own: normalizers, backends and shards need not know
            torch.lerp(student_CVs, self.tile_CVs, self._interpolation, out=self.tile_CVs)
        local = local_statistics(self.spec, self.kernels, student_CVs, self.tile_CVs)
        return merge_both(
            self.spec, local, student_CVs, self.tile_CVs, labels, self.shard, self.top_k, self._has_label_p
        )

    def edge_masses(self, norms: LogNormalizers, top1: Tensor, nodes: EdgeNodes, is_wide: bool) -> Tensor:
        """``tile_math.edge_masses`` of all shards, added up (one all-gather)."""
        spec = replace(self.spec, is_wide=is_wide)
        if self.tile_CVs.shape[1]:
            local = self.kernels.edge_masses(spec, self.tile_CVs, norms, top1 - self.shard.start, nodes)
        else:
            local = torch.zeros_like(torch.cat([part for part in nodes if part is not None], -1))
        return all_gather_rows(local, self.shard.group).sum(0)

    def sums(
        self, student_CVs: Tensor, norms: LogNormalizers, bounds: MaskBounds | None, is_pair: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Sums over classes [R, C, num_sums] of every shard and the merged span sums [C, 2] (one all-gather).

        ``is_pair`` [C] has the positions that start a span pair, None: no span sums are wanted.
        """
        if is_pair is not None:
            self._pairs = SpanPairs(is_pair, kept_PVs=None if self._pairs is None else self._pairs.kept_PVs)
        local = self._local_sums(student_CVs, norms, bounds, is_pair is not None)
        gathered = all_gather_rows(local, self.shard.group)
        width = self.spec.num_sums
        return gathered[..., :width], None if is_pair is None else gathered[..., width:].sum(0)

    def is_in_place(self, device: torch.device) -> bool:
        """Whether ``gradient`` had better write to the student's tile."""
        return self.kernels.is_in_place(device)

    def gradient(
        self,
        student_CVs: Tensor,
        norms: LogNormalizers,
        bounds: MaskBounds | None,
        weights: GradientWeights,
        out_CVs: Tensor,
        of_label: Tensor | None = None,
    ) -> None:
        """Writes the derivative by the student's logits; ``of_label`` [C] is what terms of the labels take off them."""
        if of_label is not None:
            weights = weights._replace(label=of_label if weights.label is None else weights.label + of_label)
        if student_CVs.shape[1]:
            self.kernels.gradient(self.spec, student_CVs, self.tile_CVs, norms, bounds, weights, out_CVs, self._pairs)

    def _local_sums(
        self, student_CVs: Tensor, norms: LogNormalizers, bounds: MaskBounds | None, has_span: bool
    ) -> Tensor:
        num_tokens, num_classes = student_CVs.shape
        if num_classes == 0:
            zeros = student_CVs.new_zeros(num_tokens, self.spec.num_sums + len(SpanSum) * has_span)
            if self.spec.is_clipped and self.spec.has_totals:
                zeros[:, self.spec.columns.index(ClippedSum.SHIFT)] = -math.inf
            return zeros
        sums = self.kernels.sums(self.spec, student_CVs, self.tile_CVs, norms, bounds)
        if not has_span:
            return sums
        assert self._pairs is not None
        of_pairs = span_sums(self.spec, self.kernels, student_CVs, self.tile_CVs, norms, self._pairs)
        return torch.cat([sums, of_pairs], -1)


def span_sums(
    spec: TileSpec,
    kernels: TorchKernels,
    student_CVs: Tensor,
    teacher_CVs: Tensor,
    norms: LogNormalizers,
    pairs: SpanPairs,
) -> Tensor:
    """Local sums [C, 2] of the span pair that each position starts; 0 for the last one."""
    if len(student_CVs) < 2:
        return student_CVs.new_zeros(len(student_CVs), len(SpanSum))
    return F.pad(kernels.span_sums(spec, student_CVs, teacher_CVs, norms, pairs), (0, 0, 0, 1))


def local_statistics(
    spec: TileSpec, kernels: TorchKernels, student_CVs: Tensor, teacher_CVs: Tensor | None
) -> LocalStatistics:
    """Statistics of a shard; one without classes has empty sums."""
    num_tokens, num_classes = student_CVs.shape
    if num_classes:
        return kernels.statistics(spec, student_CVs, teacher_CVs)
    lowest, zeros = student_CVs.new_full((num_tokens,), -math.inf), student_CVs.new_zeros(num_tokens)
    untempered = zeros if spec.has_untempered else None
    if teacher_CVs is None:
        return LocalStatistics(lowest, zeros, untempered, None, None, None, None)
    return LocalStatistics(lowest, zeros, untempered, lowest, zeros, None, None)
