"""The place of this process: the grid (data-parallel x tensor-parallel) and its process groups, passed as an argument.

Tensor-parallel ranks are consecutive (``rank = dp_rank * tp_size + tp_rank``), the order that DeepSpeed's AutoTP uses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from megadistill.errors import MegadistillError, TopologyError
from megadistill.files import reason_of
from megadistill.parallel.topology import divisors
from megadistill.parallel.vocab import VocabShard

T = TypeVar("T")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ParallelContext:
    """The place of one process in the grid.

    A group is None where it would hold one process, so that one-process runs never communicate. Groups have the run's
    timeout: a dead peer ends the job instead of hanging it.

    Attributes:
        rank: Global rank, ``dp_rank * tp_size + tp_rank``.
        world_size: Number of processes.
        tp_rank: Place in the tensor-parallel group.
        tp_size: Processes that share a model's layers.
        dp_rank: Place in the data-parallel group.
        dp_size: Processes that share a batch.
        tp_group: The processes with this ``dp_rank``.
        dp_group: The processes with this ``tp_rank``.
        device: Where this process computes.
        timeout_s: Seconds after which a collective call gives up.
    """

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
    tp_group: dist.ProcessGroup | None
    dp_group: dist.ProcessGroup | None
    device: torch.device
    timeout_s: float = 0.0

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> ParallelContext:
        """One process without torch.distributed."""
        return cls(0, 1, 0, 1, 0, 1, None, None, torch.device(device))

    @classmethod
    def build(cls, tp_size: int, timeout_s: float, device: torch.device) -> ParallelContext:
        """Makes the groups of the initialized torch.distributed world (collective: every rank calls it).

        Args:
            tp_size: Tensor-parallel size.
            timeout_s: Seconds after which a collective call gives up.
            device: Where this process computes.

        Raises:
            TopologyError: ``tp_size`` does not divide the number of processes.
        """
        rank, world_size = dist.get_rank(), dist.get_world_size()
        if world_size % tp_size:
            raise TopologyError(
                f"a tensor-parallel size of {tp_size} does not divide the number of processes, {world_size}; "
                f"allowed: {', '.join(map(str, divisors(world_size)))}",
                setting="parallel.tp_size",
            )
        dp_size, timeout = world_size // tp_size, timedelta(seconds=timeout_s)
        tp_group = dp_group = None
        # new_group is collective over the world: every rank makes every group, in the same order.
        for dp_index in range(dp_size if tp_size > 1 else 0):
            group = dist.new_group([dp_index * tp_size + i for i in range(tp_size)], timeout=timeout)
            tp_group = group if rank // tp_size == dp_index else tp_group
        for tp_index in range(tp_size if dp_size > 1 else 0):
            group = dist.new_group([i * tp_size + tp_index for i in range(dp_size)], timeout=timeout)
            dp_group = group if rank % tp_size == tp_index else dp_group
        return cls(
            rank, world_size, rank % tp_size, tp_size, rank // tp_size, dp_size, tp_group, dp_group, device, timeout_s
        )

    def set_all_timeouts(self) -> None:
        """Gives every process group of this process the run's timeout. No communication.

        Groups that a library has made meanwhile have torch's default of many minutes.
        """
        if self.world_size > 1:
            for group in list(dist.distributed_c10d._world.pg_map):
                dist.distributed_c10d._set_pg_timeout(timedelta(seconds=self.timeout_s), group)

    @property
    def is_rank0(self) -> bool:
        """True on the one rank that prints and writes shared files."""
        return self.rank == 0

    def vocab_shard(self, total: int) -> VocabShard:
        """This rank's slice of ``total`` classes, sharded as DeepSpeed shards a vocabulary-parallel head."""
        return VocabShard.split(total, self.tp_size, self.tp_rank, self.tp_group)

    def sum_over_dp(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the data-parallel group, in place (one all-reduce; nothing when dp_size is 1)."""
        if self.dp_group is not None:
            dist.all_reduce(tensor, group=self.dp_group)
        return tensor

    def max_over_world(self, tensor: torch.Tensor) -> torch.Tensor:
        """Maximum over all ranks, in place (one all-reduce; nothing in a world of one)."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def gather_objects_over_dp(self, item: T) -> list[T]:
        """The picklable ``item`` of every data-parallel rank, in rank order (one object all-gather)."""
        return _gather_objects(item, self.dp_size, self.dp_group)

    def gather_objects_over_tp(self, item: T) -> list[T]:
        """The picklable ``item`` of every tensor-parallel rank, in rank order (one object all-gather)."""
        return _gather_objects(item, self.tp_size, self.tp_group)

    def gather_shapes_over_tp(self, ours: Shapes, wholes: Shapes) -> list[Shapes]:
        """The shapes of every tensor-parallel rank's shards, in rank order (one object all-gather).

        Args:
            ours: Name -> shape of this rank's shard.
            wholes: Name -> whole shape; a context without other ranks tells theirs from it (``planning``).
        """
        return self.gather_objects_over_tp(ours)

    def gather_objects(self, item: T) -> list[T]:
        """The picklable ``item`` of every rank of the world (one object all-gather)."""
        return _gather_objects(item, self.world_size, None)

    def exchange(self, given: torch.Tensor, given_sizes: Sequence[int], taken_sizes: Sequence[int]) -> torch.Tensor:
        """Gives every rank of the world its part of ``given`` (one all-to-all; the identity in a world of one).

        Args:
            given: [sum of given_sizes], the parts for the ranks in their order.
            given_sizes: Number of elements for each rank.
            taken_sizes: Number of elements from each rank.

        Returns:
            [sum of taken_sizes], the parts from the ranks in their order.
        """
        if self.world_size == 1:
            return given
        taken = given.new_empty(sum(taken_sizes))
        dist.all_to_all_single(taken, given, list(taken_sizes), list(given_sizes))
        return taken

    def barrier(self) -> None:
        """Waits for every rank of the world."""
        if self.world_size > 1:
            dist.barrier()

    def run_on_rank0(self, action: Callable[[], T], writes: Path | None = None) -> T:
        """Runs ``action`` on rank 0 and returns its result on every rank.

        Collective over the world: rank 0 broadcasts its result, or the error that every rank then raises. What a rank
        holds is the result and its pickle, whatever the number of ranks.

        Args:
            action: Runs on rank 0 alone. Its result must be picklable.
            writes: The file or folder that it writes, for the error.

        Raises:
            MegadistillError: On every rank, the one that ``action`` raised, or that a file cannot be read or written.
        """
        outcome: list[Any] = [None, None]  # result, error
        if self.is_rank0:
            try:
                outcome[0] = action()
            except MegadistillError as error:
                outcome[1] = error
            except OSError as error:
                if writes is not None:
                    outcome[1] = MegadistillError(f"{writes} cannot be written: {reason_of(error)}")
                elif error.filename is not None:
                    outcome[1] = MegadistillError(f"{error.filename}: {reason_of(error)}")
                else:
                    raise
        if self.world_size > 1:
            dist.broadcast_object_list(outcome, src=0)
        result, raised = outcome
        if raised is not None:
            raise raised
        return cast(T, result)

    def raise_on_all_ranks(self, error: MegadistillError | None) -> None:
        """Raises the first rank's error on every rank, so that no rank waits for one that has ended.

        One object all-gather over the world, of errors only, which are small.

        Args:
            error: This rank's error; None where it has none.

        Raises:
            MegadistillError: A rank has one.
        """
        for gathered in self.gather_objects(error):
            if gathered is not None:
                raise gathered


def _gather_objects(item: T, size: int, group: dist.ProcessGroup | None) -> list[T]:
    if size == 1:
        return [item]
    items: list[Any] = [None] * size
    dist.all_gather_object(items, item, group=group)
    return items
