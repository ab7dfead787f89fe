"""ZeRO-3's secondary partitions (hpZ, ZeRO++): each few data-parallel ranks together keep all weights once more.

The first gathering of a parameter after an update is over the data-parallel group; later ones, those of the backward
pass and all of a frozen model, are over these few ranks, which share a machine. DeepSpeed's own groups for it are
neighboring ranks of the world, whose tensor-parallel shards differ, and it makes them for one engine a process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from deepspeed.utils import groups

from megadistill.engines.zero_parameter import ZeroParameter
from megadistill.parallel.context import ParallelContext
from megadistill.parallel.topology import check_hpz_size


@contextmanager
def secondary_partitions(context: ParallelContext, size: int) -> Iterator[None]:
    """ZeRO-3 engines that are made meanwhile keep secondary partitions.

    Collective over the world where ``size`` is not 1: every rank makes every group.

    Args:
        context: The grid of processes.
        size: Data-parallel ranks that keep the weights once more; 1: none do.

    Raises:
        TopologyError: ``size`` does not divide the data-parallel size.
    """
    check_hpz_size(size, context.dp_size)
    if size == 1:
        yield
        return
    own = None
    for tp_rank in range(context.tp_size):
        for first in range(0, context.dp_size, size):
            ranks = [dp_rank * context.tp_size + tp_rank for dp_rank in range(first, first + size)]
            group = dist.new_group(ranks, timeout=timedelta(seconds=context.timeout_s))
            own = group if context.rank in ranks else own
    # DeepSpeed has a module global for the group, and asks for it while it makes an engine only.
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = own
    try:
        yield
    finally:
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def forget_secondary_partitions(parameters: Iterable[ZeroParameter]) -> None:
    """The primary partitions have been written: the next gathering is over the data-parallel group again."""
    for parameter in parameters:
        parameter.ds_secondary_tensor = None
