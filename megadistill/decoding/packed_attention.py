"""Causal attention of chunks of different lengths in one call, for half-precision weights on CUDA.

Shapes: T tokens of all chunks, one chunk after the other; S columns of the cache; D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from megadistill.decoding.kv_cache import PrefillChunk


class Packing(NamedTuple):
    """Where the kernel finds each of n chunks: their ends [n + 1] among all queries and among all keys, and the longest
    of each."""

    query_ends: Tensor
    key_ends: Tensor
    max_queries: int
    max_keys: int


def pack(
    chunks: Sequence[PrefillChunk], offsets: Sequence[int], *, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Packing | None:
    """How to pack chunks; None where the kernel does not run (other devices and types, a single chunk)."""
    is_half = dtype in (torch.bfloat16, torch.float16)
    if device.type != "cuda" or not is_half or head_dim % 8 or head_dim > 256 or len(chunks) < 2:
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    num_queries = [len(chunk.tokens) for chunk in chunks]
    num_keys = [c.column - offset + n for c, offset, n in zip(chunks, offsets, num_queries, strict=True)]
    query_ends, key_ends = (
        torch.tensor([0, *accumulate(sizes)], dtype=torch.int32).to(device) for sizes in (num_queries, num_keys)
    )
    return Packing(query_ends, key_ends, max(num_queries), max(num_keys))


def packed_attention(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float) -> Tensor:
    """[T, heads, D] of query [T, heads, D] and the keys and values [sum of keys, key-value heads, D] of all chunks."""
    attn_out: Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, *packing, 0.0, True, False, scale=scale
    )[0]
    return attn_out


def kept_keys_and_values(
    layer_cache: Tensor, chunks: Sequence[PrefillChunk], offsets: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Keys and values [sum of keys, key-value heads, D] that the chunks attend to, from a layer's cache [2, B, heads,
    S, D] that holds their own."""
    key, value = (
        torch.cat(
            [
                side[chunk.slot, :, offset : chunk.column + len(chunk.tokens)].transpose(0, 1)
                for chunk, offset in zip(chunks, offsets, strict=True)
            ]
        )
        for side in layer_cache
    )
    return key, value
