"""One decoding step of a whole cache as a CUDA graph: one launch per token instead of some forty per layer.

What is recorded must keep its shapes and addresses. So all slots take part in every step; those that are not being
decoded write into the spare column of the cache, which is never read.

Shapes: B slots, of which the first A are active; H hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Not cuDNN's attention, which makes a plan for every shape, 0.1 s or more each: every token of decoding is a new shape.
ATTENTION_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class StepInputs(NamedTuple):
    """What a step reads.

    Attributes:
        tokens: [B] the token of each slot.
        starts: [B] the first column of each slot.
        column: Scalar, the column to write.
        num_active: Scalar, A.
    """

    tokens: Tensor
    starts: Tensor
    column: Tensor
    num_active: Tensor


class DecodeGraph:
    """A recorded step.

    It does not know the cache, which knows it: a cycle would keep both until the garbage collector runs.

    Args:
        step: Maps inputs to hidden states [B, H], for one cache. Recording runs it and writes nothing that is read.
        num_slots: B.
        reads: A tensor that the step reads and its owner may replace; it is kept alive.
    """

    def __init__(self, step: Callable[[StepInputs], Tensor], num_slots: int, reads: Tensor) -> None:
        device = reads.device
        self._reads = reads
        self._starts: Tensor | None = None
        slots = torch.zeros(2, num_slots, dtype=torch.int64, device=device)
        scalars = torch.zeros(2, dtype=torch.int64, device=device)
        self._inputs = StepInputs(slots[0], slots[1], scalars[0], scalars[1])
        self._graph, stream = torch.cuda.CUDAGraph(), _stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        # Not torch.cuda.graph, which would return all of the allocator's memory first.
        with torch.cuda.stream(stream), sdpa_kernel(ATTENTION_KERNELS):
            step(self._inputs)
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._hidden = step(self._inputs)
            finally:
                self._graph.capture_end()
        torch.cuda.current_stream(device).wait_stream(stream)

    def replay(self, tokens: Tensor, column: int, starts: Tensor | None) -> Tensor:
        """Reads tokens into a column of the active slots.

        Args:
            tokens: [A].
            column: The column.
            starts: [B] first columns of the slots, a new tensor whenever slots were swapped; None where all are 0.

        Returns:
            Hidden states [A, H].
        """
        inputs = self._inputs
        if starts is not None and starts is not self._starts:
            inputs.starts.copy_(starts)
            self._starts = starts
        inputs.tokens[: len(tokens)] = tokens
        inputs.column.fill_(column)
        inputs.num_active.fill_(len(tokens))
        self._graph.replay()
        return self._hidden[: len(tokens)].clone()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all recordings: cuBLAS keeps 32 MiB for every stream that it has met."""
    return torch.cuda.Stream(device)
