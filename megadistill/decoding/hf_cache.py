"""The project's preallocated cache as the key-value cache of a transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


def cache_over(layers: Sequence[torch.Tensor], num_examples: int, column: int) -> Cache:
    """A transformers ``Cache`` over existing buffers.

    A forward pass writes its keys and values from ``column`` on and reads all columns before.

    Args:
        layers: For each layer [2 (keys, values), B, key-value heads, S, D].
        num_examples: The first examples are used, the others are left alone.
        column: The columns before are filled.
    """
    from transformers.cache_utils import Cache, CacheLayerMixin

    class Layer(CacheLayerMixin):
        is_sliding = False

        def __init__(self, layer_cache: torch.Tensor) -> None:
            super().__init__()
            self.keys, self.values = self._buffers = layer_cache[0, :num_examples], layer_cache[1, :num_examples]
            self.is_initialized, self.filled = True, column

        def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
            raise AssertionError("the buffers exist already")

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            (keys, values), end = self._buffers, self.filled + key_states.shape[2]
            keys[:, :, self.filled : end] = key_states
            values[:, :, self.filled : end] = value_states
            self.filled = end
            return keys[:, :, :end], values[:, :, :end]

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.filled + query_length, 0

        def get_seq_length(self) -> int:
            return self.filled

        def get_max_length(self) -> int:
            return -1

    return Cache(layers=[Layer(layer_cache) for layer_cache in layers])
