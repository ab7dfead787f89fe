"""One decoding step of a whole cache as a CUDA graph: a launch a token where there were some forty a layer.

What is recorded must not change its shapes or addresses. So all slots take part in every step; those that are not
being decoded write into the cache's spare column, which nobody reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# cuDNN's attention makes a plan for every shape, 0.1 s and more each, and decoding has a new shape with every token.
ATTENTIONS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Place(NamedTuple):
    """What a step reads: tokens [B] and first columns [B] of all slots, and as scalars the column to write and the
    number of slots that are being decoded."""

    tokens: Tensor
    starts: Tensor
    column: Tensor
    num_active: Tensor


class DecodeGraph:
    """``step`` (a Place to hidden states [B, H]), recorded for one cache of ``num_rows`` slots. Recording runs it and
    writes nothing that is read. ``reads`` is kept: what the step reads and its owner may replace.

    It does not know the cache, which knows it: a cycle would keep both until the garbage collector comes.
    """

    def __init__(self, step: Callable[[Place], Tensor], num_rows: int, reads: Tensor) -> None:
        device = reads.device
        self._reads, self._starts = reads, None
        slots = torch.zeros(2, num_rows, dtype=torch.int64, device=device)
        self._place = Place(slots[0], slots[1], *torch.zeros(2, dtype=torch.int64, device=device).unbind())
        self._graph, stream = torch.cuda.CUDAGraph(), _stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        # Not torch.cuda.graph, which would give all of the allocator's memory back first.
        with torch.cuda.stream(stream), sdpa_kernel(ATTENTIONS):
            step(self._place)
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._hidden = step(self._place)
            finally:
                self._graph.capture_end()
        torch.cuda.current_stream(device).wait_stream(stream)

    def replay(self, tokens: Tensor, column: int, starts: Tensor | None) -> Tensor:
        """Hidden states [k, H] of tokens [k], which are read into ``column`` of the first k slots. ``starts``: the
        slots' first columns, another tensor when they have changed places; None: 0."""
        place = self._place
        if starts is not None and starts is not self._starts:
            place.starts.copy_(starts)
            self._starts = starts
        place.tokens[: len(tokens)] = tokens
        place.column.fill_(column)
        place.num_active.fill_(len(tokens))
        self._graph.replay()
        return self._hidden[: len(tokens)].clone()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: cuBLAS keeps 32 MiB for every stream that it has seen."""
    return torch.cuda.Stream(device)
