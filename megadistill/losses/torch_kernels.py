"""The work between the matrix products in torch, eager or compiled: ``tile_math.py`` on blocks of tokens."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megadistill.errors import ConfigError
from megadistill.losses import tile_math, tile_span
from megadistill.losses.tiles import (
    EdgeNodes,
    GradientWeights,
    LocalStatistics,
    LogNormalizers,
    MaskBounds,
    SpanPairs,
    SpanSum,
    TileSpec,
)

# Elements per thread of the blocks that the eager backend splits a CPU tile into. Temporaries of this size stay in the
# cache and come from the allocator's heap; from 128 KiB on the system would map and unmap each, page by page.
_EAGER_BLOCK = 2**15
_MAX_BLOCK_THREADS = 8  # more threads share pieces of this many: the temporaries count as memory
# The same for compiled code, each call of which takes a tenth of a millisecond: a chunk of the automatic size, 2**23,
# and its halo.
_COMPILED_BLOCK = 9 * 2**20
# Inductor's thresholds, in operations and reads, and a number that is never reached.
_KEEPS_TILES_FROM = (
    "realize_opcount_threshold",
    "realize_reads_threshold",
    "realize_acc_reads_threshold",
    "realize_cpu_opcount_threshold",
    "realize_cpu_acc_reads_threshold",
)
_NEVER = 10**6
# Compiled versions of one function that may exist at a time: configurations, dtypes and shapes of a process.
_MAX_VERSIONS = 1024


class TorchKernels:
    """Eager torch."""

    def statistics(self, spec: TileSpec, student_CVs: Tensor, teacher_CVs: Tensor | None) -> LocalStatistics:
        """See ``tile_math.statistics``."""
        return self._run(tile_math.statistics, 0, spec, student_CVs, teacher_CVs)

    def sums(
        self,
        spec: TileSpec,
        student_CVs: Tensor,
        teacher_CVs: Tensor,
        norms: LogNormalizers,
        bounds: MaskBounds | None,
    ) -> Tensor:
        """See ``tile_math.sums``."""
        return self._run(tile_math.sums, 0, spec, student_CVs, teacher_CVs, norms, bounds)

    def edge_masses(
        self, spec: TileSpec, teacher_CVs: Tensor, norms: LogNormalizers, top_column: Tensor, nodes: EdgeNodes
    ) -> Tensor:
        """See ``tile_math.edge_masses``."""
        return self._run(tile_math.edge_masses, 0, spec, teacher_CVs, norms, top_column, nodes)

    def span_sums(
        self, spec: TileSpec, student_CVs: Tensor, teacher_CVs: Tensor, norms: LogNormalizers, pairs: SpanPairs
    ) -> Tensor:
        """See ``tile_span.span_sums``; what is no pair may have any sums."""
        return self._run(tile_span.span_sums, 1, spec, student_CVs, teacher_CVs, norms)

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
    ) -> None:
        """Writes the whole derivative: token terms, span, labels; to ``student_CVs`` where that is ``out_CVs``."""
        arguments = (student_CVs, teacher_CVs, norms, bounds, weights)
        logits_CVs = student_CVs
        if out_CVs is not student_CVs:
            self._run(tile_math.gradient, 0, spec, *arguments, out_CVs)
        else:
            if weights.span_pair is not None and len(student_CVs) > 1:
                logits_CVs = student_CVs.clone()
            self._run(tile_math.gradient_in_place, 0, spec, *arguments)
        if teacher_CVs is not None:
            self.add_span(spec, logits_CVs, teacher_CVs, norms, weights, out_CVs)
        add_labels(weights, out_CVs)

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
        if weights.span_pair is not None and len(student_CVs) > 1:
            self._run(tile_span.span_gradient, 1, spec, student_CVs, teacher_CVs, norms, weights, out_CVs)

    def is_in_place(self, device: torch.device) -> bool:
        """Whether ``gradient`` had better write to the student's tile: what was read a moment ago is in the cache."""
        return False

    def gradient_dtype(self, factor: torch.dtype, total: torch.dtype) -> torch.dtype:
        """The dtype of the derivative, for products that read ``factor`` and accumulate ``total``."""
        return total

    def _run(self, function: Callable[..., Any], overlap: int, spec: TileSpec, *arguments: Any) -> Any:
        return _in_blocks(functools.partial(function, spec), overlap, _EAGER_BLOCK, arguments)


class CompiledKernels(TorchKernels):
    """The functions of ``tile_math`` through torch.compile; eager for a single token, since a 1 would be compiled in.

    Args:
        may_fall_back: Where compiling fails: one warning, and eager torch from then on; else ConfigError.
    """

    def __init__(self, may_fall_back: bool = False) -> None:
        self._may_fall_back, self._is_broken = may_fall_back, False

    def span_sums(
        self, spec: TileSpec, student_CVs: Tensor, teacher_CVs: Tensor, norms: LogNormalizers, pairs: SpanPairs
    ) -> Tensor:
        """The sums of the pairs alone, and on a CPU their part of the derivative, kept in ``pairs``."""
        num_tokens, num_classes = student_CVs.shape
        pairs.row = None
        # Elsewhere than on a CPU, how many pairs there are would have to be waited for.
        if not pairs.is_kept or student_CVs.device.type != "cpu" or self._is_broken:
            return super().span_sums(spec, student_CVs, teacher_CVs, norms, pairs)
        first = pairs.is_pair[:-1].nonzero().squeeze(-1)
        result = student_CVs.new_zeros(num_tokens - 1, len(SpanSum))
        num_pairs = len(first)
        pairs.is_empty = num_pairs == 0
        if pairs.is_empty:
            return result
        if num_pairs == 1:  # a 1 would be compiled in
            first = first.repeat(2)
        if pairs.kept_PVs is None or len(pairs.kept_PVs) < len(first):
            pairs.kept_PVs = student_CVs.new_empty(max(len(first), num_tokens // 2), num_classes)
        tiles = (student_CVs, teacher_CVs, norms._replace(untempered_log=None))
        result[first] = self._run_block(tile_span.pair_sums, spec, *tiles, first, pairs.kept_PVs[: len(first)])
        pairs.row = torch.zeros(num_tokens, dtype=torch.int64)
        pairs.row[first[:num_pairs]] = torch.arange(num_pairs)
        return result

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
    ) -> None:
        """Writes the whole derivative in one pass, with what ``span_sums`` has kept."""
        if pairs is not None and pairs.is_empty:
            weights = weights._replace(span_pair=None, span_inner=None)
        if pairs is None or pairs.row is None or self._is_broken:
            super().gradient(spec, student_CVs, teacher_CVs, norms, bounds, weights, out_CVs, pairs)
            return
        assert weights.span_pair is not None and weights.span_inner is not None
        pair, norm = weights.span_pair, weights.span_pair * weights.span_inner
        after = tile_span.PairShare(pairs.row, pair)
        before = tile_span.PairShare(*(F.pad(part[:-1], (1, 0)) for part in after))
        of_token = weights._replace(
            student=weights.student - norm - F.pad(norm[:-1], (1, 0)),
            span_pair=None, span_inner=None, label=None, label_column=None,
        )  # fmt: skip
        arguments: tuple[Any, ...] = (student_CVs, teacher_CVs, norms, bounds, of_token, before, after)
        if out_CVs is student_CVs:
            function: Callable[..., None] = tile_span.gradient_with_pairs_in_place
        else:
            function, arguments = tile_span.gradient_with_pairs, (*arguments, out_CVs)

        def run(*block: Any) -> None:
            self._run_block(function, spec, *block, pairs.kept_PVs)

        _in_blocks(run, 0, _COMPILED_BLOCK, arguments)
        add_labels(weights, out_CVs)

    def is_in_place(self, device: torch.device) -> bool:
        """On a CPU, where one pass reads each logit for the last time and writes the derivative."""
        return device.type == "cpu" and not self._is_broken

    def _run(self, function: Callable[..., Any], overlap: int, spec: TileSpec, *arguments: Any) -> Any:
        if self._is_broken:
            return super()._run(function, overlap, spec, *arguments)
        run = functools.partial(self._run_block, function, spec)
        return _in_blocks(run, overlap, _COMPILED_BLOCK, arguments)

    def _run_block(self, function: Callable[..., Any], spec: TileSpec, *block: Any) -> Any:
        if block[0].shape[0] < 2 or self._is_broken:
            return function(spec, *block)
        limits = {"recompile_limit": _MAX_VERSIONS, "accumulated_recompile_limit": 16 * _MAX_VERSIONS}
        # The numbers of the specification are constants.
        with torch._dynamo.config.patch({**limits, "specialize_float": True}):
            try:
                return _compiled(function, spec, block[0].device.type == "cpu")(*block)
            except torch._dynamo.exc.BackendCompilerFailed as error:  # before anything was computed
                self._give_up(error)
        return function(spec, *block)

    def _give_up(self, error: Exception) -> None:
        reason = str(getattr(error, "inner_exception", error)).strip().splitlines()[0]
        if not self._may_fall_back:
            raise ConfigError(f"loss.backend=compile: {reason}; fix it, or set loss.backend to torch") from error
        message = f"the losses run in eager torch, which is slower: {reason} (loss.backend=torch silences this)"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        self._is_broken = True


@functools.cache
def _compiled(function: Callable[..., Any], spec: TileSpec, is_cpu: bool) -> Callable[..., Any]:
    # Inductor keeps what takes many operations as whole tiles in memory, which takes longer than a second computation.
    options: dict[str, Any] | None = dict.fromkeys(_KEEPS_TILES_FROM, _NEVER) if is_cpu else None
    return torch.compile(functools.partial(function, spec), dynamic=True, fullgraph=True, options=options)


def add_labels(weights: GradientWeights, out_CVs: Tensor) -> None:
    """Subtracts each token's label weight from the derivative at its label, where this tile has that class."""
    if weights.label is None or weights.label_column is None:
        return
    num_classes = out_CVs.shape[1]
    is_here = (weights.label_column >= 0) & (weights.label_column < num_classes)
    column = weights.label_column.clamp(0, num_classes - 1).unsqueeze(-1)
    out_CVs.scatter_add_(-1, column, torch.where(is_here, -weights.label, 0.0).unsqueeze(-1).to(out_CVs.dtype))


def _in_blocks(function: Callable[..., Any], overlap: int, elements: int, arguments: tuple[Any, ...]) -> Any:
    """Calls ``function`` on blocks of tokens of CPU tiles.

    With an overlap of 1 a block's last token is the next block's first.
    """
    num_tokens, width = arguments[0].shape
    elements *= min(torch.get_num_threads(), _MAX_BLOCK_THREADS)
    size = max(1 + overlap, elements // max(width, 1))
    if arguments[0].device.type != "cpu" or num_tokens <= size:
        return function(*arguments)
    starts = range(0, num_tokens - overlap, size - overlap)
    return _joined([function(*(_block(argument, start, start + size) for argument in arguments)) for start in starts])


def _block(argument: Any, start: int, stop: int) -> Any:
    """Tokens [start, stop) of a tensor, or of every tensor in a named tuple; None stays."""
    if argument is None:
        return None
    if isinstance(argument, Tensor):
        return argument[start:stop]
    return argument._make(_block(part, start, stop) for part in argument)


def _joined(results: list[Any]) -> Any:
    """Results of blocks, concatenated along the tokens."""
    first = results[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.cat(results)
    return first._make(_joined([result[i] for result in results]) for i in range(len(first)))
