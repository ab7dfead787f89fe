"""Who this process is: the (data-parallel x tensor-parallel) grid and its process groups, passed around as an argument.

Tensor-parallel ranks are consecutive (``rank = dp_rank * tp_size + tp_rank``), the order that DeepSpeed's AutoTP uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megadistill.errors import MegadistillError, TopologyError
from megadistill.parallel.vocab import VocabShard


@dataclass(frozen=True)
class ParallelContext:
    """The place of one process in the grid.

    ``tp_group`` and ``dp_group`` are None when they would hold one process, so that one-process runs never communicate.
    Both were made with the run's timeout: a dead peer ends the job instead of hanging it.
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
        """Makes the groups of the initialised torch.distributed world (collective: every rank calls it).

        Raises TopologyError when ``tp_size`` does not divide the number of processes.
        """
        rank, world_size = dist.get_rank(), dist.get_world_size()
        if world_size % tp_size:
            raise TopologyError(
                f"parallel.tp_size={tp_size} does not divide the number of processes {world_size}; "
                f"allowed: {[n for n in range(1, world_size + 1) if world_size % n == 0]}"
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
        """Gives every process group of this process the run's timeout: those that a library has made meanwhile have
        torch's default of many minutes. No communication."""
        if self.world_size > 1:
            for group in list(dist.distributed_c10d._world.pg_map):
                dist.distributed_c10d._set_pg_timeout(timedelta(seconds=self.timeout_s), group)

    @property
    def is_rank0(self) -> bool:
        """True on the one rank that prints and writes shared files."""
        return self.rank == 0

    def vocab_shard(self, total: int) -> VocabShard:
        """This rank's slice of ``total`` classes, cut as DeepSpeed cuts a vocabulary-parallel head."""
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

    def gather_objects_over_dp(self, item: Any) -> list[Any]:
        """The picklable ``item`` of every data-parallel rank, in rank order (one object all-gather)."""
        return _gather_objects(item, self.dp_size, self.dp_group)

    def gather_objects_over_tp(self, item: Any) -> list[Any]:
        """The picklable ``item`` of every tensor-parallel rank, in rank order (one object all-gather)."""
        return _gather_objects(item, self.tp_size, self.tp_group)

    def gather_objects(self, item: Any) -> list[Any]:
        """The picklable ``item`` of every rank of the world (one object all-gather)."""
        return _gather_objects(item, self.world_size, None)

    def barrier(self) -> None:
        """Waits for every rank of the world."""
        if self.world_size > 1:
            dist.barrier()

    def run_on_rank0(self, action: Callable[[], Any], writes: Path | None = None) -> Any:
        """Rank 0's (picklable) result of ``action`` on every rank; its MegadistillError, or that a file cannot be read
        or written, is raised on every rank. ``writes``: what it writes, for the error.

        Collective over the world: two gathers.
        """
        result, error = None, None
        if self.is_rank0:
            try:
                result = action()
            except MegadistillError as found:
                error = found
            except OSError as found:
                if writes is not None:
                    error = MegadistillError(f"{writes} cannot be written: {found.strerror or found}")
                elif found.filename is not None:
                    error = MegadistillError(f"{found.filename}: {found.strerror}")
                else:
                    raise
        self.raise_on_all_ranks(error)
        return self.gather_objects(result)[0]

    def raise_on_all_ranks(self, error: MegadistillError | None) -> None:
        """Raises the first rank's error on every rank, so that nobody waits for a rank that has left (one gather)."""
        for found in self.gather_objects(error):
            if found is not None:
                raise found


def _gather_objects(item: Any, size: int, group: dist.ProcessGroup | None) -> list[Any]:
    if size == 1:
        return [item]
    items: list[Any] = [None] * size
    dist.all_gather_object(items, item, group=group)
    return items
