"""Who runs the work between the matrix products: one interface, three implementations (docs/architecture.md).

torch     eager; on CPUs a few rows at a time, so that what happens between two products stays in the cache
compile   the same functions through torch.compile; on CPUs this needs a C++ compiler
triton    kernels written for CUDA (`triton_backend.py`); Triton's interpreter runs them in tests
"""

from __future__ import annotations

import functools
import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

from megadistill.errors import ConfigError
from megadistill.losses import rowmath
from megadistill.losses.config import Backend
from megadistill.losses.tiles import LocalStatistics, RowConstants, RowWeights, TileSpec
from megadistill.parallel.vocab import VocabShard

# Elements a thread of the pieces that the eager backend cuts a CPU tile into. Temporaries of this size stay in cache
# and come from the allocator's heap; from 128 KiB on each would be mapped from the system, page by page, and unmapped.
_EAGER_BLOCK = 2**15
# The same for compiled code: on CPUs the compiler keeps whatever holds an exponential as a tensor of its own.
_COMPILED_BLOCK = 2**19
_MAX_BLOCK_THREADS = 8  # more threads share pieces of this many: the temporaries count as memory
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
    """torch.compile over the functions of `rowmath`. A single row goes the eager way: a 1 would be compiled in.

    Where compiling fails: with `may_fall_back` one warning, and eager torch from then on; else ConfigError.
    """

    def __init__(self, may_fall_back: bool = False) -> None:
        self._may_fall_back, self._is_broken = may_fall_back, False

    def _run(self, function: Callable[..., Any], overlap: int, spec: TileSpec, *arguments: Any) -> Any:
        if self._is_broken:
            return super()._run(function, overlap, spec, *arguments)
        compiled, eager = _compiled(function, spec), functools.partial(function, spec)

        def run(*block: Any) -> Any:
            if block[0].shape[0] < 2 or self._is_broken:
                return eager(*block)
            try:
                return compiled(*block)
            except torch._dynamo.exc.BackendCompilerFailed as error:  # before anything was computed
                self._give_up(error)
                return eager(*block)

        with torch._dynamo.config.patch(recompile_limit=_MAX_VERSIONS, accumulated_recompile_limit=16 * _MAX_VERSIONS):
            return _in_blocks(run, overlap, _COMPILED_BLOCK, arguments)

    def _give_up(self, error: Exception) -> None:
        reason = str(getattr(error, "inner_exception", error)).strip().splitlines()[0]
        if not self._may_fall_back:
            raise ConfigError(f"loss.backend=compile: {reason}; mend it, or set loss.backend to torch") from error
        message = f"the losses run in eager torch, which is slower: {reason} (loss.backend=torch silences this)"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        self._is_broken = True


@functools.cache
def _compiled(function: Callable[..., Any], spec: TileSpec) -> Callable[..., Any]:
    return torch.compile(functools.partial(function, spec), dynamic=True, fullgraph=True)


def row_kernels(backend: Backend, shard: VocabShard, device: torch.device) -> TorchKernels:
    """The kernels of a configuration. Raises ConfigError as `check_backend` does."""
    check_backend(backend, device)
    return _kernels(choose_backend(backend, shard, device), backend == "auto")


def choose_backend(backend: Backend, shard: VocabShard, device: torch.device) -> Backend:
    """What `auto` stands for; any other backend is itself.

    Triton on CUDA where it is installed; torch.compile on a CPU with a C++ compiler and at least 8192 classes a rank;
    eager torch otherwise. The same on every rank of a homogeneous job; ranks that differ still agree on every
    collective.
    """
    if backend != "auto":
        return backend
    if device.type == "cuda":
        return "triton" if has_triton() else "torch"
    # From a group-wide quantity: shards differ by a class.
    is_large = shard.total >= _COMPILE_FROM * shard.tp_size
    return "compile" if is_large and has_compiler() else "torch"


@functools.cache
def _kernels(backend: Backend, may_fall_back: bool) -> TorchKernels:
    if backend == "torch":
        return TorchKernels()
    if backend == "compile":
        return CompiledKernels(may_fall_back)
    from megadistill.losses.triton_backend import TritonKernels

    return TritonKernels()


def check_backend(backend: Backend, device: torch.device) -> None:
    """Raises ConfigError for a backend that there is not, or that cannot run on this machine and device."""
    if backend not in get_args(Backend):
        raise ConfigError(f"loss.backend={backend!r} must be one of {', '.join(get_args(Backend))}")
    is_cuda = device.type == "cuda"
    if backend == "compile" and not (has_triton() if is_cuda else has_compiler()):
        what = "the package triton" if is_cuda else "a C++ compiler and Python's headers (apt: g++ python3-dev)"
        raise ConfigError(f"loss.backend=compile needs {what}, not found here; set loss.backend to auto or torch")
    if backend == "triton" and not (has_triton() and (is_cuda or os.environ.get("TRITON_INTERPRET") == "1")):
        raise ConfigError(
            f"loss.backend=triton needs a CUDA device and the package triton; the device is {device.type}, triton is "
            f"{'installed' if has_triton() else 'not installed'}; set loss.backend to auto, torch or compile"
        )


@functools.cache
def has_compiler() -> bool:
    """Whether torch.compile finds what it needs for CPU code: a C++ compiler and Python's headers."""
    headers = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    return shutil.which(os.environ.get("CXX") or "g++") is not None and os.path.exists(headers)


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
    elements *= min(torch.get_num_threads(), _MAX_BLOCK_THREADS)
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
