"""Makes the project's own code choose as it does on a GPU, where there is none: for dry runs.

Choices by device are in many places (tiles of the losses, mixed products, packed weights, recorded decoding steps), and
new ones are made. So tensors say that they are on CUDA when this package's modules or torch's optimizers ask, and what
is to be made on CUDA is made on the CPU. Nothing is computed by a GPU's kernels: it is for ``Ghost`` alone. The few
functions of ``torch.cuda`` that such code calls are replaced here, in one table; a process that does this should do
nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from megadistill.planning.counter import Counter, Tally

CUDA = torch.device("cuda", 0)
_CPU = torch.device("cpu")
_ASKERS = ("megadistill.", "torch.optim.")
_TENSOR: Any = torch.Tensor  # its attributes are descriptors, which mypy takes for their values
_DEVICE, _IS_CUDA = _TENSOR.device.__get__, _TENSOR.is_cuda.__get__
_RMS_NORMS = (F.rms_norm, torch.rms_norm)
# Compute capability of the cards that the project is made for (A100 and later).
_CAPABILITY = (9, 0)


@contextmanager
def pretend_cuda(counter: Counter, memory: int) -> Iterator[torch.device]:
    """Code of this package takes tensors for CUDA tensors.

    Args:
        counter: Counts what recorded graphs replay.
        memory: Bytes of the GPU that is pretended.

    Yields:
        The device.
    """

    class Graph(_Graph):  # a class: modules that are imported meanwhile name it in annotations
        def __init__(self, *_: Any, **__: Any) -> None:
            super().__init__(counter)

    table: dict[str, Any] = {
        "synchronize": lambda *_, **__: None,
        "get_device_properties": lambda *_, **__: SimpleNamespace(total_memory=memory, name="dry run"),
        "get_device_capability": lambda *_, **__: _CAPABILITY,
        "mem_get_info": lambda *_, **__: (memory, memory),
        "is_current_stream_capturing": lambda: False,
        "Stream": _Stream,
        "current_stream": lambda *_, **__: _Stream(),
        "stream": lambda *_, **__: nullcontext(),
        "CUDAGraph": Graph,
        "graph": _capture,
    }
    mode, engine = _SaysCuda(counter), torch.autograd._engine_run_backward
    storage: Any = torch.UntypedStorage
    change_size = storage.resize_

    def resize(self: Any, num_bytes: int) -> Any:
        """What waits in host memory gives its storage back, and gets it again."""
        changed = change_size(self, num_bytes)
        counter.resize(self._cdata, num_bytes)
        return changed

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        """Torch leaves modes while it looks for gradients, but what is computed again must choose as it did before."""
        with mode:
            return engine(*args, **kwargs)

    backward = mock.patch.object(torch.autograd, "_engine_run_backward", run_backward)
    with mock.patch.multiple(torch.cuda, **table), mock.patch.object(storage, "resize_", resize), backward, mode:
        yield CUDA


class _SaysCuda(TorchFunctionMode):
    """Tensors say that they are on CUDA to those who choose by it; what is asked for on CUDA is made on the CPU.

    Pinned memory is the host's and not counted.
    """

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (_IS_CUDA, _DEVICE):
            asker = sys._getframe(1).f_globals.get("__name__", "")
            if asker.startswith(_ASKERS):
                return True if func == _IS_CUDA else CUDA
            return func(*args, **kwargs)
        if func in _RMS_NORMS and _asker().startswith(_ASKERS):
            # One kernel on CUDA, several on CPUs: a product reads and writes as much.
            weight = kwargs["weight"] if "weight" in kwargs else args[2]
            return args[0] * (2.0 if weight is None else weight)
        if any(isinstance(arg, torch.device) for arg in args):
            args = tuple(_on_cpu(arg) if isinstance(arg, torch.device) else arg for arg in args)
        if kwargs.get("device") is not None:
            kwargs = kwargs | {"device": _on_cpu(torch.device(kwargs["device"]))}
        if kwargs.get("pin_memory"):
            pinned = func(*args, **kwargs | {"pin_memory": False})
            self._counter.leave_out(pinned)
            return pinned
        return func(*args, **kwargs)


def _asker() -> str:
    """Module of the innermost code that is not torch's own but for its optimizers."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if not name.startswith("torch.") or name.startswith(_ASKERS):
            return name
        frame = frame.f_back
    return ""


def _on_cpu(device: torch.device) -> torch.device:
    return _CPU if device.type == "cuda" else device


class _Stream:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        """There is nothing to wait for."""

    def synchronize(self) -> None:
        """There is nothing to wait for."""


class _Graph:
    """Stands for ``torch.cuda.CUDAGraph``: a replay is one launch that does what was recorded."""

    def __init__(self, counter: Counter) -> None:
        self._counter, self._recorded, self._before = counter, Tally(), Tally()

    def capture_begin(self, *_: Any, **__: Any) -> None:
        """Recording runs nothing."""
        self._before = self._counter.tally.copy()

    def capture_end(self) -> None:
        """What was dispatched meanwhile is taken back."""
        self._recorded = self._counter.since(self._before)
        self._counter.repeat(self._recorded, -1)
        self._recorded.operations = 1

    def replay(self) -> None:
        """Counts what was recorded."""
        self._counter.repeat(self._recorded)

    def pool(self) -> None:
        """There is no pool of memory."""


@contextmanager
def _capture(graph: _Graph, *_: Any, **__: Any) -> Iterator[None]:
    graph.capture_begin()
    try:
        yield
    finally:
        graph.capture_end()
