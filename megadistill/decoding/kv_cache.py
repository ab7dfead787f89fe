"""Keys and values of the examples that are decoded together, allocated once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class PrefillChunk(NamedTuple):
    """Consecutive tokens of one example to read.

    Attributes:
        slot: The example's slot in the cache.
        column: Column of the first token, whose position is ``column`` minus the slot's offset.
        tokens: The tokens.
    """

    slot: int
    column: int
    tokens: Sequence[int]


class LayerViews(NamedTuple):
    """The first n slots of a layer's cache.

    Attributes:
        columns: [2 (keys, values), n, key-value heads, S, D].
        keys: [n * key-value heads, D, S].
        values: [n * key-value heads, S, D].
    """

    columns: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


class KVCache:
    """One buffer per layer for B examples and S columns.

    An example lives in a slot and begins at the column ``offsets[slot]``, where its position is 0: examples that are
    decoded together end their prompts in one column. Slots can swap their examples, so that those being decoded are
    always in the first ones.

    Args:
        num_layers: Number of layers.
        offsets: First column of each example.
        shape: (key-value heads of this rank, S, D).
        dtype: Type of keys and values.
        device: Where they are kept.
        has_spare: One more column, after a multiple of eight, that is written and never read.

    Attributes:
        layers: For each layer [2 (keys, values), B, key-value heads, S, D].
        offsets: First column of the example in each slot.
        spare: Number of the spare column; None without one.
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
        num_heads, columns, head_dim = shape
        self.spare = -(-columns // 8) * 8 if has_spare else None  # kernels want masks of such widths
        columns = columns if self.spare is None else self.spare + 1
        # Zeros where columns are masked: a masked value is multiplied by zero, and zero times NaN is NaN.
        make = torch.zeros if any(offsets) or has_spare else torch.empty
        size = (2, len(offsets), num_heads, columns, head_dim)
        self.layers = [make(size, dtype=dtype, device=device) for _ in range(num_layers)]
        self.offsets = list(offsets)
        self._forget()

    def _forget(self) -> None:
        """Forgets what was derived from the places of examples and buffers."""
        self._starts: torch.Tensor | None = None
        self._padding: torch.Tensor | None = None
        self._mask: torch.Tensor | None = None
        self._views: list[LayerViews] = []

    def starts(self) -> torch.Tensor | None:
        """The offsets as a tensor [B]; None where all examples start in column 0 and no key needs to be masked."""
        if self._starts is None and any(self.offsets):
            self._starts = torch.tensor(self.offsets, device=self.layers[0].device)
        return self._starts

    def padding(self) -> torch.Tensor:
        """[B, S] bool: the columns before the first one of each example."""
        if self._padding is None:
            columns = torch.arange(self.layers[0].shape[3], device=self.layers[0].device)
            starts = torch.tensor(self.offsets, device=columns.device)
            self._padding = columns[None] < starts[:, None]
        return self._padding

    def mask(self, num_examples: int, *, per_head: bool) -> torch.Tensor:
        """Zeros, and -inf in the columns before the first one of each example.

        Args:
            num_examples: n, the first slots.
            per_head: [n * key-value heads, 1, S] instead of [n, 1, 1, S]; the same in all calls of a cache.
        """
        num_heads = self.layers[0].shape[2] if per_head else 1
        if self._mask is None:
            zeros = torch.zeros(self.padding().shape, dtype=self.layers[0].dtype, device=self.layers[0].device)
            mask = zeros.masked_fill_(self.padding(), -torch.inf)
            self._mask = mask.repeat_interleave(num_heads, 0).unsqueeze(1) if per_head else mask[:, None, None]
        return self._mask[: num_examples * num_heads]

    def views(self, num_examples: int) -> list[LayerViews]:
        """What a decoding step of the first slots writes and reads, layer by layer; made once for several steps."""
        if not self._views or self._views[0].columns.shape[1] != num_examples:
            columns = [layer[:, :num_examples] for layer in self.layers]
            self._views = [LayerViews(c, c[0].flatten(0, 1).transpose(1, 2), c[1].flatten(0, 1)) for c in columns]
        return self._views

    def swap(self, a: int, b: int) -> None:
        """Exchanges the examples of two slots."""
        if a == b:
            return
        self.offsets[a], self.offsets[b] = self.offsets[b], self.offsets[a]
        self._forget()
        for layer in self.layers:
            kept = layer[:, a].clone()
            layer[:, a] = layer[:, b]
            layer[:, b] = kept

    def sort(self, order: Sequence[int]) -> None:
        """Slot i gets the example of slot ``order[i]``.

        Each layer is copied into the buffer of the one before; with a spare column every layer keeps its buffer, whose
        address may be recorded.
        """
        if list(order) == list(range(len(order))):
            return
        self.offsets = [self.offsets[slot] for slot in order]
        self._forget()
        slots = torch.tensor(list(order), device=self.layers[0].device)
        if self.spare is not None:
            for layer in self.layers:
                layer.copy_(layer.index_select(1, slots))
            return
        spare = torch.empty_like(self.layers[0])
        for i, layer in enumerate(self.layers):
            torch.index_select(layer, 1, slots, out=spare)
            self.layers[i], spare = spare, layer
