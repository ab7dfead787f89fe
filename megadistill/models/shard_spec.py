"""How tensor parallelism shards a parameter, and how the shards make it whole again. Pure functions of shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megadistill.parallel.vocab import VocabShard


@dataclass(frozen=True)
class ShardSpec:
    """One parameter over the tensor-parallel ranks.

    Attributes:
        shape: Shape of the whole parameter.
        dim: The dimension that is sharded; None where every rank holds the whole.
        blocks: Number of parameters that lie fused along it (GPT-2's query, key and value), each of which is sharded.
        sizes: Extent of each rank's shard along it.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    blocks: int = 1
    sizes: tuple[int, ...] = ()

    @classmethod
    def even(cls, shape: Sequence[int], dim: int | None, blocks: int, tp_size: int) -> ShardSpec:
        """Shards as equal as can be, larger ones first, as AutoTP makes them.

        Args:
            shape: Shape of the whole parameter.
            dim: The dimension that is sharded, or None.
            blocks: Number of parameters that lie fused along it.
            tp_size: Number of shards.
        """
        if dim is None or tp_size == 1:
            return cls(tuple(shape))
        block = shape[dim] // blocks
        sizes = tuple(blocks * VocabShard.split(block, tp_size, rank).size for rank in range(tp_size))
        return cls(tuple(shape), dim, blocks, sizes)

    @classmethod
    def from_shard_shapes(cls, shape: Sequence[int], shards: Sequence[Sequence[int]], blocks: int) -> ShardSpec:
        """Reads the spec off the shapes of all ranks' shards.

        Args:
            shape: Shape of the whole parameter.
            shards: Shape of each rank's shard.
            blocks: Number of parameters that lie fused along the sharded dimension.
        """
        differing = [dim for dim in range(len(shape)) if any(shard[dim] != shape[dim] for shard in shards)]
        if not differing:
            return cls(tuple(shape))
        assert len(differing) == 1, f"a parameter of shape {shape} is sharded into {shards}"
        dim = differing[0]
        sizes = tuple(shard[dim] for shard in shards)
        assert sum(sizes) == shape[dim], f"shards {shards} do not make up {shape}"
        return cls(tuple(shape), dim, blocks, sizes)

    def shard_shape(self, tp_rank: int) -> tuple[int, ...]:
        """Shape of one rank's shard."""
        if self.dim is None:
            return self.shape
        return (*self.shape[: self.dim], self.sizes[tp_rank], *self.shape[self.dim + 1 :])

    def whole_ranges(self, tp_rank: int, dim: int, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Where indices [start, end) of one rank's shard are in the whole parameter, along one dimension, in order."""
        if dim != self.dim:
            yield start, end
            return
        width, whole = self.sizes[tp_rank] // self.blocks, self.shape[dim] // self.blocks
        for block in range(self.blocks):
            first = block * whole + sum(self.sizes[:tp_rank]) // self.blocks - block * width
            low, high = max(start, block * width), min(end, (block + 1) * width)
            if low < high:
                yield first + low, first + high

    def shard(self, whole: torch.Tensor, tp_rank: int) -> torch.Tensor:
        """One rank's shard of the whole tensor."""
        if self.dim is None:
            return whole
        widths = [size // self.blocks for size in self.sizes]
        parts = whole.unflatten(self.dim, (self.blocks, -1)).split(widths, self.dim + 1)
        return parts[tp_rank].flatten(self.dim, self.dim + 1)

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole tensor from all ranks' shards (from the first one, where nothing is sharded)."""
        if self.dim is None:
            return shards[0]
        parts = [shard.unflatten(self.dim, (self.blocks, -1)) for shard in shards]
        return torch.cat(parts, self.dim + 1).flatten(self.dim, self.dim + 1)
