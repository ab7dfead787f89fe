"""A rank's slice of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from megadistill.errors import TopologyError


@dataclass(frozen=True)
class VocabShard:
    """Classes [start, stop) of a vocabulary, held by this rank of a tensor-parallel group.

    Shards may differ in size and may be empty. Padded rows of an embedding are not classes: they are removed before a
    shard is made.

    Attributes:
        start: First class.
        stop: One past the last class; a shard has Vs = ``stop - start`` classes.
        total: V, the classes of the whole vocabulary.
        group: The ranks that together hold the whole vocabulary, in class order; None means one process and no
            communication.

    Raises:
        TopologyError: The bounds do not fit the vocabulary.
    """

    start: int
    stop: int
    total: int
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= self.total:
            raise TopologyError(
                f"vocabulary shard [{self.start}, {self.stop}) does not lie within the {self.total} classes"
            )

    @property
    def size(self) -> int:
        """Number of classes that this rank holds."""
        return self.stop - self.start

    @property
    def tp_size(self) -> int:
        """Number of ranks that share the vocabulary."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def tp_rank(self) -> int:
        """This rank's place in the group; its classes follow those of every lower place."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @classmethod
    def split(cls, total: int, tp_size: int, tp_rank: int, group: dist.ProcessGroup | None = None) -> VocabShard:
        """One shard of a contiguous split, larger shards first (the rule of DeepSpeed's AutoTP).

        Args:
            total: V, the classes of the whole vocabulary.
            tp_size: Number of shards.
            tp_rank: Which of them.
            group: The tensor-parallel group.

        Raises:
            TopologyError: There is no such rank.
        """
        if tp_size < 1 or not 0 <= tp_rank < tp_size:
            raise TopologyError(f"tensor-parallel rank {tp_rank} does not exist in a group of {tp_size}")
        small, larger = divmod(total, tp_size)
        start = tp_rank * small + min(tp_rank, larger)
        return cls(start, start + small + (tp_rank < larger), total, group)
