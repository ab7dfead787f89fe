"""Room that we own, seen by a transformers model as its key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def cache_over(layers: Sequence[torch.Tensor], num_rows: int, column: int) -> Any:
    """A transformers ``Cache`` over [2, rows, heads, columns, head_dim] tensors, one a layer: the first ``num_rows``
    rows, filled up to ``column``. A forward pass writes its keys and values behind that column and reads all before."""
    from transformers.cache_utils import Cache, CacheLayerMixin

    class Layer(CacheLayerMixin):
        is_sliding = False

        def __init__(self, room: torch.Tensor) -> None:
            super().__init__()
            self.keys, self.values = room[0, :num_rows], room[1, :num_rows]
            self.is_initialized, self.filled = True, column

        def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
            raise AssertionError("the room exists already")

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            end = self.filled + key_states.shape[2]
            self.keys[:, :, self.filled : end] = key_states
            self.values[:, :, self.filled : end] = value_states
            self.filled = end
            return self.keys[:, :, :end], self.values[:, :, :end]

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.filled + query_length, 0

        def get_seq_length(self) -> int:
            return self.filled

        def get_max_length(self) -> int:
            return -1

    return Cache(layers=[Layer(room) for room in layers])
