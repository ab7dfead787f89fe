"""The ranks of one machine: what one of them does for all, and what it sends them through the machine's memory."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from megadistill.errors import MegadistillError
from megadistill.parallel.context import ParallelContext

T = TypeVar("T")


@dataclass(frozen=True)
class Node:
    """The place of a process among the processes of its machine.

    Attributes:
        context: The grid of processes.
        ranks: The global ranks of this machine, in order.
        group: A gloo group of them; None where there is one, or where it was not asked for.
    """

    context: ParallelContext
    ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = None

    @classmethod
    def build(cls, context: ParallelContext, *, has_group: bool = False) -> Node:
        """Finds out which ranks share this machine.

        Collective over the world: one object all-gather, and with ``has_group`` one group per machine.

        Args:
            context: The grid of processes.
            has_group: Make the group that ``broadcast`` needs.
        """
        machines = context.gather_objects(_machine())
        by_machine = {name: tuple(i for i, other in enumerate(machines) if other == name) for name in machines}
        own = by_machine[machines[context.rank]]
        group = None
        if has_group and context.world_size > 1:
            timeout = timedelta(seconds=context.timeout_s)
            for ranks in by_machine.values():  # new_group is collective: every rank makes every group
                made = dist.new_group(list(ranks), timeout=timeout, backend="gloo")
                group = made if ranks == own and len(own) > 1 else group
        return cls(context, own, group)

    @property
    def rank(self) -> int:
        """This process's number on its machine."""
        return self.ranks.index(self.context.rank)

    def one_first(self, action: Callable[[], T], others: Callable[[], AbstractContextManager[object]]) -> T:
        """Carries out ``action`` on the first rank of every machine, and then on the others.

        Collective over the world: the others wait for the first ranks of all machines, for as long as the run's timeout
        allows.

        Args:
            action: What to do: for example, download and open files.
            others: Makes the context in which the other ranks do it: for example, without network.

        Raises:
            MegadistillError: On every rank, what ``action`` raised on a first one.
        """
        result, error = None, None
        if self.rank == 0:
            try:
                result = action()
            except MegadistillError as raised:
                error = raised
        self.context.raise_on_all_ranks(error)
        if result is None:
            with others():
                result = action()
        return result

    def broadcast(self, tensor: torch.Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The tensor of the machine's first rank (one broadcast over the machine; none where it has one rank).

        Args:
            tensor: The tensor, on the CPU, on the first rank; None on the others.
            shape: Its shape.
            dtype: Its type.
        """
        if tensor is None:
            tensor = torch.empty(tuple(shape), dtype=dtype)
        if self.group is not None:
            # As bytes: gloo does not know every type.
            dist.broadcast(tensor.contiguous().view(-1).view(torch.uint8), src=self.ranks[0], group=self.group)
        return tensor


def _machine() -> str:
    """Differs between machines with one name, and between containers of one machine, which may not share files."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text(encoding='utf-8').strip() if boot.exists() else ''}"
