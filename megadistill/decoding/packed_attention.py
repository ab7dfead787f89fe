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
    """Where the kernel finds each of n chunks.

    Attributes:
        query_ends: [n + 1] ends of the chunks among all queries.
        key_ends: [n + 1] ends of the chunks among all keys.
        max_queries: The most queries of a chunk.
        max_keys: The most keys of a chunk.
    """

    query_ends: Tensor
    key_ends: Tensor
    max_queries: int
    max_keys: int


def pack_chunks(
    chunks: Sequence[PrefillChunk], offsets: Sequence[int], *, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Packing | None:
    """How to pack chunks.

    Args:
        chunks: The chunks.
        offsets: First column of each chunk's example.
        head_dim: D.
        dtype: Type of queries, keys and values.
        device: Where they are.

    Returns:
        The packing; None where the kernel does not run (other devices and types) or does not help (a single chunk).
    """
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
    """Causal attention of all chunks.

    Args:
        query: [T, heads, D].
        key: [keys of all chunks, key-value heads, D].
        value: As ``key``.
        packing: Where each chunk is.
        scale: Factor on the products of queries and keys.

    Returns:
        [T, heads, D].
    """
    attn_out: Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, *packing, 0.0, True, False, scale=scale
    )[0]
    return attn_out


def kept_keys_and_values(
    layer_cache: Tensor, chunks: Sequence[PrefillChunk], offsets: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """What chunks attend to, from a cache that holds their own keys and values already.

    Args:
        layer_cache: [2 (keys, values), B, key-value heads, S, D].
        chunks: The chunks.
        offsets: First column of each chunk's example.

    Returns:
        Keys and values, each [keys of all chunks, key-value heads, D].
    """
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
