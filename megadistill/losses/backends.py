"""Who runs the work between the matrix products: one interface, three implementations (docs/architecture.md).

torch     eager; on CPUs a few rows at a time, so that what happens between two products stays in the cache
compile   the same functions through torch.compile; on CPUs this needs a C++ compiler
triton    kernels written for CUDA (`triton_backend.py`); Triton's interpreter runs them in tests
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megadistill.errors import ConfigError
from megadistill.losses import rowmath
from megadistill.losses.config import Backend
from megadistill.losses.tiles import LocalStatistics, RowConstants, RowWeights, TileSpec
from megadistill.parallel.vocab import VocabShard

# Elements of the pieces that the eager backend cuts a CPU tile into: a few such temporaries fit a core's cache.
_EAGER_BLOCK = 2**17
# The same for compiled code: on CPUs the compiler keeps whatever holds an exponential as a tensor of its own.
_COMPILED_BLOCK = 2**19
# Classes a rank from which compiling, which costs seconds once, is worth its while on a CPU.
_COMPILE_FROM = 8192
# Compiled versions of one function that may exist at a time: configurations, dtypes and shapes of a process.
_MAX_VERSIONS = 256


class TorchKernels:
    """Eager torch; `rowmath` documents what each method computes."""

    def statistics(self, spec: TileSpec, student_CV: Tensor, teacher_CV: Tensor | None) -> LocalStatistics:
        return self._run(rowmath.statistics, 0, spec, student_CV, teacher_CV)

    def sums(self, spec: TileSpec, student_CV: Tensor, teacher_CV: Tensor, rows: RowConstants) -> Tensor:
        return self._run(rowmath.sums, 0, spec, student_CV, teacher_CV, rows)

    def span_sums(self, spec: TileSpec, student_CV: Tensor, teacher_CV: Tensor, rows: RowConstants) -> Tensor:
        return self._run(rowmath.span_sums, 1, spec, student_CV, teacher_CV, rows)

    def gradient(
        self,
        spec: TileSpec,
        student_CV: Tensor,
        teacher_CV: Tensor | None,
        rows: RowConstants,
        weights: RowWeights,
        out_CV: Tensor,
    ) -> None:
        """Writes the whole derivative: token terms, span, labels."""
        self._run(rowmath.gradient, 0, spec, student_CV, teacher_CV, rows, weights, out_CV)
        if teacher_CV is not None:
            self.add_span(spec, student_CV, teacher_CV, rows, weights, out_CV)
        add_labels(weights, out_CV)

    def add_span(
        self,
        spec: TileSpec,
        student_CV: Tensor,
        teacher_CV: Tensor,
        rows: RowConstants,
        weights: RowWeights,
        out_CV: Tensor,
    ) -> None:
        """Adds the span part of the derivative, where there is one."""
        if weights.span_pair is not None and len(student_CV) > 1:
            self._run(rowmath.span_gradient, 1, spec, student_CV, teacher_CV, rows, weights, out_CV)

    def gradient_dtype(self, factor: torch.dtype, total: torch.dtype) -> torch.dtype:
        """dtype in which the derivative is written, for products that read `factor` and accumulate `total`."""
        return total

    def _run(self, function: Callable[..., Any], overlap: int, spec: TileSpec, *arguments: Any) -> Any:
        return _in_blocks(functools.partial(function, spec), overlap, _EAGER_BLOCK, arguments)


class CompiledKernels(TorchKernels):
    """torch.compile over the functions of `rowmath`. A single row goes the eager way: a 1 would be compiled in."""

    def _run(self, function: Callable[..., Any], overlap: int, spec: TileSpec, *arguments: Any) -> Any:
        compiled, eager = _compiled(function, spec), functools.partial(function, spec)

        def run(*block: Any) -> Any:
            return (compiled if block[0].shape[0] > 1 else eager)(*block)

        with torch._dynamo.config.patch(recompile_limit=_MAX_VERSIONS, accumulated_recompile_limit=16 * _MAX_VERSIONS):
            return _in_blocks(run, overlap, _COMPILED_BLOCK, arguments)


@functools.cache
def _compiled(function: Callable[..., Any], spec: TileSpec) -> Callable[..., Any]:
    return torch.compile(functools.partial(function, spec), dynamic=True, fullgraph=True)


def row_kernels(backend: Backend, shard: VocabShard, device: torch.device) -> TorchKernels:
    """The kernels of a configuration. Raises ConfigError for one that this machine cannot run.

    `auto`: Triton on CUDA where it is installed; torch.compile on a CPU with a C++ compiler and at least 8192 classes a
    rank; eager torch otherwise. The same on every rank of a homogeneous job; ranks that differ still agree on every
    collective.
    """
    is_cuda = device.type == "cuda"
    if backend == "auto":
        backend = _best(shard, is_cuda)
    if backend == "torch":
        return TorchKernels()
    if backend == "compile":
        if not is_cuda and not has_compiler():
            raise ConfigError(
                "loss.backend=compile needs a C++ compiler on a CPU (g++, or what CXX names), and there is none; "
                "Debian, Ubuntu: apt-get install -y g++; or set loss.backend to torch"
            )
        return CompiledKernels()
    if not has_triton() or not (is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        raise ConfigError(
            f"loss.backend=triton needs a CUDA device and the package triton; the device is {device.type}, triton is "
            f"{'installed' if has_triton() else 'not installed'}; set loss.backend to auto, torch or compile"
        )
    from megadistill.losses.triton_backend import TritonKernels

    return TritonKernels()


def _best(shard: VocabShard, is_cuda: bool) -> Backend:
    if is_cuda:
        return "triton" if has_triton() else "compile"
    # From a group-wide quantity: shards differ by a class.
    is_large = shard.total >= _COMPILE_FROM * shard.tp_size
    return "compile" if is_large and has_compiler() else "torch"


@functools.cache
def has_compiler() -> bool:
    """Whether torch.compile finds a C++ compiler for CPU code."""
    return shutil.which(os.environ.get("CXX") or "g++") is not None


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def add_labels(weights: RowWeights, out_CV: Tensor) -> None:
    """Takes each row's label weight off the derivative at its label, where this tile holds it."""
    if weights.label is None or weights.label_column is None:
        return
    num_classes = out_CV.shape[1]
    is_here = (weights.label_column >= 0) & (weights.label_column < num_classes)
    column = weights.label_column.clamp(0, num_classes - 1).unsqueeze(-1)
    out_CV.scatter_add_(-1, column, torch.where(is_here, -weights.label, 0.0).unsqueeze(-1).to(out_CV.dtype))


def _in_blocks(function: Callable[..., Any], overlap: int, elements: int, arguments: tuple[Any, ...]) -> Any:
    """Calls `function` on blocks of rows of CPU tiles; with overlap 1 a block's last row is the next one's first."""
    num_rows, width = arguments[0].shape
    size = max(1 + overlap, elements // max(width, 1))
    if arguments[0].device.type != "cpu" or num_rows <= size:
        return function(*arguments)
    starts = range(0, num_rows - overlap, size - overlap)
    return _joined([function(*(_rows(argument, start, start + size) for argument in arguments)) for start in starts])


def _rows(argument: Any, start: int, stop: int) -> Any:
    """Rows of a tensor, or of every tensor in a named tuple; None stays."""
    if argument is None:
        return None
    if isinstance(argument, Tensor):
        return argument[start:stop]
    return argument._make(_rows(part, start, stop) for part in argument)


def _joined(parts: list[Any]) -> Any:
    """Results of blocks, one below the other."""
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.cat(parts)
    return first._make(_joined([part[i] for part in parts]) for i in range(len(first)))
