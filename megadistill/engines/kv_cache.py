"""Keys and values of a wave of rows, allocated once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Reading(NamedTuple):
    """Tokens of one row to read, the first of them at ``column`` of slot ``slot`` (position = column - its offset)."""

    slot: int
    column: int
    tokens: Sequence[int]


class KVCache:
    """``layers[l]`` is [2 (keys, values), rows, key-value heads of this rank, columns, head_dim].

    A row lives in a slot; ``offsets[slot]`` is its first column, where its position is 0: rows that are decoded
    together end their prompts in one column. Slots can change places, so the rows that are being decoded are always the
    first. ``shape`` is (heads, columns, head_dim). With ``has_spare`` there is one more, number ``spare``, behind a
    multiple of eight; ``num_decoded`` and ``recorded`` are for the model that decodes.
    """

    def __init__(
        self,
        num_layers: int,
        offsets: Sequence[int],
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        has_spare: bool = False,
    ) -> None:
        heads, columns, head_dim = shape
        rows = len(offsets)
        self.spare = -(-columns // 8) * 8 if has_spare else None  # kernels want masks of such widths
        self.num_decoded = 0
        self.recorded: Any = None
        if self.spare is not None:
            columns = self.spare + 1
        # Zeros, not empty: a masked column is multiplied by nothing, and nothing times NaN is NaN.
        make = torch.zeros if any(offsets) or has_spare else torch.empty
        self.layers = [make(2, rows, heads, columns, head_dim, dtype=dtype, device=device) for _ in range(num_layers)]
        self.offsets = list(offsets)
        self._starts: torch.Tensor | None = None
        self._padding: torch.Tensor | None = None

    def starts(self) -> torch.Tensor | None:
        """The offsets as a tensor [rows]; None where all rows start in column 0 and no key needs to be masked."""
        if self._starts is None and any(self.offsets):
            self._starts = torch.tensor(self.offsets, device=self.layers[0].device)
        return self._starts

    def swap(self, a: int, b: int) -> None:
        """Exchanges the rows of two slots."""
        if a == b:
            return
        self.offsets[a], self.offsets[b] = self.offsets[b], self.offsets[a]
        self._starts = self._padding = None
        for layer in self.layers:
            kept = layer[:, a].clone()
            layer[:, a] = layer[:, b]
            layer[:, b] = kept

    def sort(self, order: Sequence[int]) -> None:
        """Slot i gets the row of slot ``order[i]``. Each layer is copied into the room of the one before; with a spare
        column every layer keeps its room, whose address may be recorded."""
        if list(order) == list(range(len(order))):
            return
        self.offsets = [self.offsets[slot] for slot in order]
        self._starts = self._padding = None
        slots = torch.tensor(list(order), device=self.layers[0].device)
        if self.spare is not None:
            for layer in self.layers:
                layer.copy_(layer.index_select(1, slots))
            return
        spare = torch.empty_like(self.layers[0])
        for number, layer in enumerate(self.layers):
            torch.index_select(layer, 1, slots, out=spare)
            self.layers[number], spare = spare, layer

    def padding(self) -> torch.Tensor:
        """[rows, columns] bool: columns before a row's first one."""
        if self._padding is None:
            columns = torch.arange(self.layers[0].shape[3], device=self.layers[0].device)
            starts = torch.tensor(self.offsets, device=columns.device)
            self._padding = columns[None] < starts[:, None]
        return self._padding
