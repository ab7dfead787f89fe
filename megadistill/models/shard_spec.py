"""How tensor parallelism shards a parameter, and how the shards make it whole again. Pure functions of shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megadistill.parallel.vocab import VocabShard

Blocks = int | tuple[int, ...]


@dataclass(frozen=True)
class ShardSpec:
    """One parameter over the tensor-parallel ranks.

    Attributes:
        shape: Shape of the whole parameter.
        dim: The dimension that is sharded; None where every rank holds the whole.
        blocks: Number of parameters that lie fused along it (GPT-2's query, key and value), each of which is sharded;
            where they are unequal (Phi-3's), the size of each, of which each rank has the same share.
        sizes: Extent of each rank's shard along it.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    blocks: Blocks = 1
    sizes: tuple[int, ...] = ()

    @classmethod
    def even(cls, shape: Sequence[int], dim: int | None, blocks: Blocks, tp_size: int) -> ShardSpec:
        """Shards as equal as can be, larger ones first, as AutoTP makes them.

        Args:
            shape: Shape of the whole parameter.
            dim: The dimension that is sharded, or None.
            blocks: As the attribute.
            tp_size: Number of shards.
        """
        if dim is None or tp_size == 1:
            return cls(tuple(shape))
        parts = _parts(shape[dim], blocks)
        sizes = tuple(sum(VocabShard.split(part, tp_size, rank).size for part in parts) for rank in range(tp_size))
        return cls(tuple(shape), dim, blocks, sizes)

    @classmethod
    def from_shard_shapes(cls, shape: Sequence[int], shards: Sequence[Sequence[int]], blocks: Blocks) -> ShardSpec:
        """Reads the spec off the shapes of all ranks' shards.

        Args:
            shape: Shape of the whole parameter.
            shards: Shape of each rank's shard.
            blocks: As the attribute, along the sharded dimension.
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
        mine = whole = 0  # where the block begins in the shard and in the whole
        for part in _parts(self.shape[dim], self.blocks):
            widths = self._widths(part)
            first = whole + sum(widths[:tp_rank]) - mine
            low, high = max(start, mine), min(end, mine + widths[tp_rank])
            if low < high:
                yield first + low, first + high
            mine, whole = mine + widths[tp_rank], whole + part

    def shard(self, whole: torch.Tensor, tp_rank: int) -> torch.Tensor:
        """One rank's shard of the whole tensor."""
        if self.dim is None:
            return whole
        parts = whole.split(_parts(self.shape[self.dim], self.blocks), self.dim)
        mine = [part.split(self._widths(part.shape[self.dim]), self.dim)[tp_rank] for part in parts]
        return mine[0] if len(mine) == 1 else torch.cat(mine, self.dim)

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole tensor from all ranks' shards (from the first one, where nothing is sharded)."""
        if self.dim is None:
            return shards[0]
        widths = [self._widths(part) for part in _parts(self.shape[self.dim], self.blocks)]
        parts = [shard.split([each[rank] for each in widths], self.dim) for rank, shard in enumerate(shards)]
        return torch.cat([part for block in zip(*parts, strict=True) for part in block], self.dim)

    def _widths(self, part: int) -> list[int]:
        """Extents of the ranks' shards of one block."""
        return [part * size // sum(self.sizes) for size in self.sizes]


def _parts(whole: int, blocks: Blocks) -> list[int]:
    """Extents of the blocks of a dimension."""
    return [whole // blocks] * blocks if isinstance(blocks, int) else list(blocks)
