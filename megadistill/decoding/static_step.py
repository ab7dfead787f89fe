"""A token of all active examples as one step of fixed shapes and addresses that waits for nothing: a CUDA graph.

A step reads its tokens and its column from the device, draws the next tokens, and advances the column. Every number of
active examples, rounded up, has its own recording, so a batch whose examples end gets cheaper. The rows that rounding
adds are examples that are not being written: they write into the spare column of the cache, which is never read.

Shapes: B slots, of which the first A are active; R rows of a step, A rounded up; S columns; H hidden size.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from megadistill.decoding.kv_cache import KVCache
from megadistill.decoding.sampling import Drawer
from megadistill.decoding.token_steps import INTERVAL, Stepping, Written

if TYPE_CHECKING:
    from megadistill.decoding.decoder import PlanDecoder

# Steps of a number of rows before one is recorded: short responses do not pay for the recording. They also prepare it:
# libraries allocate what they need, and a communicator comes to be with its first collective.
STEPS_BEFORE_RECORDING = 2


class StepInputs(NamedTuple):
    """What the layers of a step read.

    Attributes:
        tokens: [R] the token of each slot.
        positions: [R] its position.
        slots: [R] 0, 1, ...
        written: [R] the column that each slot writes.
        mask: [R, 1, 1, S], or [R * key-value heads, 1, S] where the decoder wants it per head: 0 for what is attended
            to, -inf elsewhere.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    written: Tensor
    mask: Tensor


class StaticSteps:
    """Implements ``TokenSteps`` over a cache with a spare column.

    Args:
        decoder: Whose layers a step runs.
        cache: The cache; its buffers stay where they are.
        drawer: Draws tokens.
        stepping: How many rows a step has, how many of them a call has, and what records them.
        keep_hidden: Hand out hidden states.
    """

    def __init__(
        self, decoder: PlanDecoder, cache: KVCache, drawer: Drawer, stepping: Stepping, *, keep_hidden: bool
    ) -> None:
        assert cache.spare is not None
        self.interval = stepping.interval
        self._decoder, self._cache, self._drawer, self._spare = decoder, cache, drawer, cache.spare
        self._rounded = stepping.rounded
        self._recorder = None if stepping.recorder is None else stepping.recorder(decoder.device)
        self._recorded: dict[int, Callable[[], None]] = {}
        self._num_steps: Counter[int] = Counter()
        num_slots, device = len(cache.offsets), decoder.device
        # The number of the step, its column, and the column that each slot writes; what a step adds to them.
        self._places, self._moves = torch.zeros(2, 2 + num_slots, dtype=torch.int64, device=device)
        self._slots = torch.arange(num_slots, device=device)
        self._tokens, self._starts = torch.zeros(2, num_slots, dtype=torch.int64, device=device)
        self._numbers = torch.zeros(self.interval, num_slots, dtype=torch.float64, device=device)
        self._drawn = torch.zeros(self.interval, num_slots, dtype=torch.int64, device=device)
        self._hidden: Tensor | None = None
        if keep_hidden:
            size = (self.interval, num_slots, decoder.head.weight.shape[1])
            self._hidden = torch.zeros(size, dtype=decoder.dtype, device=device)
        heads = decoder.num_kv_heads if decoder.masks_per_head else 1
        self._mask = torch.zeros(num_slots, heads, 1, self._spare, dtype=decoder.dtype, device=device)
        self._placed: tuple[list[int], int, int] | None = None  # offsets, next column, and A, as the device has them
        self._reads = decoder.make_positions(self._spare)  # kept alive for recordings

    @torch.inference_mode()
    def run(self, tokens: Tensor, column: int, numbers: Tensor | None, num_steps: int) -> Written:
        """As ``TokenSteps.run``."""
        num_active = len(tokens)
        self._place(num_active, column)
        self._tokens[:num_active].copy_(tokens)
        if numbers is not None:
            self._numbers[:num_steps, :num_active].copy_(numbers)
        rows = self._rounded(num_active, len(self._cache.offsets))
        for _ in range(num_steps):
            self._run(rows)
        self._placed = (list(self._cache.offsets), column + num_steps, num_active)
        hidden = None if self._hidden is None else self._hidden[:num_steps, :num_active]
        return Written(self._drawn[:num_steps, :num_active], hidden)

    def forget(self, slot: int, column: int) -> None:
        """Zeros: a masked value is multiplied by zero, and zero times what is not finite is NaN."""
        for layer in self._cache.layers:
            layer[:, slot, :, column:] = 0

    def _place(self, num_active: int, column: int) -> None:
        """Tells the device where the next steps are, in one copy, and what they attend to where that has changed."""
        offsets, num_others = self._cache.offsets, len(self._cache.offsets) - num_active
        if self._placed == (offsets, column, num_active):
            self._places[:1].zero_()
            return
        places = [0, column] + [column] * num_active + [self._spare] * num_others
        moves = [1, 1] + [1] * num_active + [0] * num_others
        on_host = torch.tensor([places, moves, [0, 0, *offsets]])
        self._places.copy_(on_host[0])
        self._moves.copy_(on_host[1])
        self._starts.copy_(on_host[2, 2:])
        columns = torch.arange(self._spare, device=self._mask.device)
        is_hidden = (columns < self._starts[:, None]) | (columns >= self._places[1])
        self._mask.zero_().masked_fill_(is_hidden[:, None, None], -torch.inf)

    def _run(self, rows: int) -> None:
        """One step: as it is, or recorded."""
        step, recorder = partial(self._step, rows), self._recorder
        if recorder is None:
            step()
            return
        if rows not in self._recorded:
            if self._num_steps[rows] < STEPS_BEFORE_RECORDING:
                self._num_steps[rows] += 1
                recorder.run(step)
                return
            self._recorded[rows] = recorder.record(step)
        self._recorded[rows]()

    def _step(self, rows: int) -> None:
        """Nothing here depends on what tensors hold."""
        number, column = self._places[:1], self._places[1:2]
        self._mask.index_fill_(-1, column, 0)
        mask = self._mask[:rows]
        inputs = StepInputs(
            self._tokens[:rows],
            column - self._starts[:rows],
            self._slots[:rows],
            self._places[2 : 2 + rows],
            mask.flatten(0, 1) if self._decoder.masks_per_head else mask,
        )
        hidden = self._decoder.decode_static(self._cache, inputs)
        numbers = None
        if not self._drawer.is_greedy:
            numbers = self._numbers[:, :rows].index_select(0, number).squeeze(0)
        drawn = self._drawer(self._decoder.logits(hidden), numbers)
        self._drawn[:, :rows].index_copy_(0, number, drawn.unsqueeze(0))
        if self._hidden is not None:
            self._hidden[:, :rows].index_copy_(0, number, hidden.unsqueeze(0))
        torch.clamp(drawn, min=0, out=self._tokens[:rows])  # NO_TOKEN is no class
        self._places.add_(self._moves)


class CudaRecorder:
    """Implements ``Recorder`` with CUDA graphs, which share their memory: one runs at a time, and none keeps results.

    Collectives of the tensor-parallel group are recorded with the rest.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, _stream(device)
        self._first: torch.cuda.CUDAGraph | None = None

    def run(self, step: Callable[[], None]) -> None:
        """Runs a step on the stream of recordings: libraries keep memory for every stream that they meet."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            step()
        current.wait_stream(self._stream)

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """The graph's ``replay``. Under tensor parallelism all ranks record together."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)  # NCCL's watchdog asks after what has not ended
        # Not torch.cuda.graph, which would return all of the allocator's memory first. The error mode lets other
        # threads, such as that watchdog, call CUDA meanwhile.
        pool = None if self._first is None else self._first.pool()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
        self._first = self._first or graph
        return graph.replay


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all recordings: cuBLAS keeps 32 MiB for every stream that it has met."""
    return torch.cuda.Stream(device)


def stepping_on(device: torch.device, *, cuda_graphs: bool = True) -> Stepping:
    """How tokens are written on a device: fast, whatever looking at them costs there.

    Args:
        device: The device.
        cuda_graphs: On GPUs, record steps (``generation.cuda_graphs``).
    """
    if device.type != "cuda":
        return Stepping()
    return Stepping(INTERVAL, is_static=True, recorder=CudaRecorder) if cuda_graphs else Stepping(INTERVAL)
