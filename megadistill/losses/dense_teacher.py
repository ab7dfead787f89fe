"""The usual teacher of the objective: hidden states and its shard of a head, so a tile of logits beside the student's.

Suffixes: C rows of one chunk, V this rank's classes, R ranks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megadistill.losses.backends import TorchKernels
from megadistill.losses.head import LogitsProjector
from megadistill.losses.statistics import RowStatistics, merge_both
from megadistill.losses.tiles import LocalStatistics, RowConstants, RowWeights, TileSpec
from megadistill.parallel.collectives import all_gather_rows
from megadistill.parallel.vocab import VocabShard


class DenseTeacher:
    """Logits of the chunk at hand, and what the kernels make of them together with the student's."""

    def __init__(
        self,
        projector: LogitsProjector,
        spec: TileSpec,
        kernels: TorchKernels,
        shard: VocabShard,
        top_k: int,
        max_rows: int,
    ) -> None:
        self.spec, self.kernels, self.shard, self.top_k = spec, kernels, shard, top_k
        self._projector = projector
        self._room = projector.new_tile(max_rows)
        self.tile_CV = self._room

    def statistics(self, chunk: slice, student_CV: Tensor, labels: Tensor) -> RowStatistics:
        """Reads a chunk: its tile, and the merged statistics of both models (one all-gather)."""
        self.tile_CV = self._projector.logits(chunk, self._room)
        local = local_statistics(self.spec, self.kernels, student_CV, self.tile_CV)
        return merge_both(self.spec, local, student_CV, self.tile_CV, labels, self.shard, self.top_k)

    def sums(self, student_CV: Tensor, rows: RowConstants, has_span: bool) -> tuple[Tensor, Tensor | None]:
        """Row sums [R, C, num_sums] of every shard and the merged span sums [C, 2] (one all-gather)."""
        local = self._local_sums(student_CV, rows, has_span)
        gathered = all_gather_rows(local, self.shard.group)
        width = self.spec.num_sums
        return gathered[..., :width], gathered[..., width:].sum(0) if has_span else None

    def gradient(self, student_CV: Tensor, rows: RowConstants, weights: RowWeights, out_CV: Tensor) -> None:
        """Writes the derivative by the student's logits."""
        if student_CV.shape[1]:
            self.kernels.gradient(self.spec, student_CV, self.tile_CV, rows, weights, out_CV)

    def _local_sums(self, student_CV: Tensor, rows: RowConstants, has_span: bool) -> Tensor:
        num_rows, num_classes = student_CV.shape
        if num_classes == 0:
            nothing = student_CV.new_zeros(num_rows, self.spec.num_sums + 2 * has_span)
            if self.spec.kind == "clipped":
                nothing[:, 8 if self.spec.has_edges else 4] = -math.inf  # the shift of an empty log-sum
            return nothing
        sums = self.kernels.sums(self.spec, student_CV, self.tile_CV, rows)
        if not has_span:
            return sums
        return torch.cat([sums, span_sums(self.spec, self.kernels, student_CV, self.tile_CV, rows)], -1)


def span_sums(
    spec: TileSpec, kernels: TorchKernels, student_CV: Tensor, teacher_CV: Tensor, rows: RowConstants
) -> Tensor:
    """[C, 2] local sums of the pair that each row starts; 0 for the last row."""
    if len(student_CV) < 2:
        return student_CV.new_zeros(len(student_CV), 2)
    return F.pad(kernels.span_sums(spec, student_CV, teacher_CV, rows), (0, 0, 0, 1))


def local_statistics(
    spec: TileSpec, kernels: TorchKernels, student_CV: Tensor, teacher_CV: Tensor | None
) -> LocalStatistics:
    """Statistics of a shard; one without classes has sums of nothing."""
    num_rows, num_classes = student_CV.shape
    if num_classes:
        return kernels.statistics(spec, student_CV, teacher_CV)
    lowest, nothing = student_CV.new_full((num_rows,), -math.inf), student_CV.new_zeros(num_rows)
    plain = nothing if spec.has_plain else None
    if teacher_CV is None:
        return LocalStatistics(lowest, nothing, plain, None, None, None, None)
    return LocalStatistics(lowest, nothing, plain, lowest, nothing, None, None)
