"""What DeepSpeed adds to the parameters that ZeRO-3 partitions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus


class _Handle(Protocol):
    def wait(self) -> None: ...


class ZeroParameter(nn.Parameter):
    """Types of the attributes; never instantiated.

    Attributes:
        ds_id: DeepSpeed's number of the parameter.
        ds_status: Whether the whole parameter is present on this rank.
        ds_numel: Elements of the whole (tensor-parallel shard of the) parameter.
        ds_tensor: This rank's run of it, flat and padded to the same length on all ranks.
        ds_secondary_tensor: This rank's run of it in a secondary partition, where there is one.
        ds_persist: It is so small that it is never released.
        ds_process_group: The ranks that share it.
        ds_zero_param_process_group: The ranks that share its secondary partition; None: it never has one.
        ds_active_sub_modules: Numbers of the modules that use it now; it is not released before the last one is done.
    """

    ds_id: int
    ds_status: ZeroParamStatus
    ds_numel: int
    ds_tensor: torch.Tensor
    ds_secondary_tensor: torch.Tensor | None
    ds_persist: bool
    ds_process_group: torch.distributed.ProcessGroup
    ds_zero_param_process_group: torch.distributed.ProcessGroup | None
    ds_active_sub_modules: set[int]

    def all_gather_coalesced(self, parameters: Sequence[ZeroParameter]) -> _Handle:
        """Begins to gather several parameters in one call."""
        raise NotImplementedError


def as_partitioned(parameter: nn.Parameter) -> ZeroParameter | None:
    """The parameter with its attributes, if ZeRO-3 partitions it."""
    return cast(ZeroParameter, parameter) if hasattr(parameter, "ds_id") else None


def partitioned_ones(parameters: Iterable[nn.Parameter | None]) -> list[ZeroParameter]:
    """Those of some parameters that ZeRO-3 partitions."""
    return [cast(ZeroParameter, p) for p in parameters if p is not None and hasattr(p, "ds_id")]
