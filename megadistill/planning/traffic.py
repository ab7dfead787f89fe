"""Collective calls as torch dispatches them: which collective, how many bytes, and which of the run's groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megadistill.parallel.context import ParallelContext
from megadistill.planning.tensors import tensors_in
from megadistill.planning.use import Group

# Operation of torch -> collective. Barriers carry no data and are not counted.
_COLLECTIVES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
}


class Call(NamedTuple):
    """One collective call.

    Attributes:
        op: The collective.
        group: Who takes part.
        num_bytes: The larger of input and output.
    """

    op: str
    group: dist.ProcessGroup
    num_bytes: int


def call_of(func: Any, args: Sequence[Any]) -> Call | None:
    """The collective call that an operation of torch's namespace ``c10d`` makes; None for a barrier and the like."""
    op = _COLLECTIVES.get(func._schema.name.split("::")[1])
    if op is None:
        return None
    group = next(group for group in map(_group, args) if group is not None)
    return Call(op, group, max(_num_bytes(arg) for arg in args))


def _group(arg: Any) -> dist.ProcessGroup | None:
    if not isinstance(arg, torch.ScriptObject):
        return None
    try:
        return dist.ProcessGroup.unbox(arg)
    except RuntimeError:  # another object of torch's, such as the kind of reduction
        return None


def _num_bytes(arg: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors_in(arg))


class Groups:
    """Tells the groups of a run apart by their ranks: libraries make groups of their own of the same ranks.

    Args:
        context: The grid of processes.
        hpz_size: Data-parallel ranks that together keep the weights once more; 1: none.
    """

    def __init__(self, context: ParallelContext, hpz_size: int = 1) -> None:
        tp, dp = context.tp_size, context.dp_size
        self._tp = [context.dp_rank * tp + i for i in range(tp)]
        self._dp = [i * tp + context.tp_rank for i in range(dp)]
        first = context.dp_rank // hpz_size * hpz_size
        self._hpz = self._dp[first : first + hpz_size]
        self._names: dict[str, Group] = {}

    def name_of(self, group: dist.ProcessGroup) -> Group:
        """Which of the run's groups it is; a group of all ranks is "tp" or "dp" where the run has only that one."""
        if group.group_name not in self._names:
            ranks = sorted(dist.get_process_group_ranks(group))
            known: dict[Group, list[int]] = {"tp": self._tp, "dp": self._dp, "hpz": self._hpz, "world": ranks}
            self._names[group.group_name] = next(name for name, members in known.items() if members == ranks)
        return self._names[group.group_name]
