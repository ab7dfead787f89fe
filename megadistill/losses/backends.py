"""The work between the matrix products: one interface, three implementations (docs/architecture.md).

- ``torch``: eager; on CPUs a few tokens at a time, so that what happens between two products stays in the cache
- ``compile``: the same functions through torch.compile; on CPUs this needs a C++ compiler
- ``triton``: kernels written for CUDA (``triton_backend.py``); Triton's interpreter runs them in tests
"""

from __future__ import annotations

import functools
import os
import shutil
import sysconfig
from typing import get_args

import torch

from megadistill.config.loss import Backend
from megadistill.errors import ConfigError
from megadistill.losses.torch_kernels import CompiledKernels, TorchKernels
from megadistill.parallel.vocab import VocabShard

# Classes per rank from which compiling, which costs seconds once, pays on a CPU.
_COMPILE_FROM = 8192


def make_kernels(backend: Backend, shard: VocabShard, device: torch.device) -> TorchKernels:
    """The kernels of a configuration. Raises ConfigError as ``check_backend`` does."""
    check_backend(backend, device)
    return _kernels(choose_backend(backend, shard, device), backend == "auto")


def choose_backend(backend: Backend, shard: VocabShard, device: torch.device) -> Backend:
    """The backend that ``auto`` stands for; any other backend is itself.

    Triton on CUDA where it is installed; torch.compile on a CPU with a C++ compiler and at least 8192 classes per rank;
    eager torch otherwise. The same on every rank of a homogeneous job; ranks that differ still agree on every
    collective.
    """
    if backend != "auto":
        return backend
    if device.type == "cuda":
        return "triton" if has_triton() else "torch"
    # From a quantity of the whole group: shards differ by a class.
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
    """Raises ConfigError for a backend that does not exist, or that cannot run on this machine and device."""
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
