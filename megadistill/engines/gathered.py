"""Parameters of a ZeRO-3 engine held whole (this rank's tensor-parallel shard of them) for a while.

Decoding token by token through ZeRO-3 gathers every parameter for every token. Gathering once around the whole
rollout and removing ZeRO's module hooks meanwhile was five times faster on two CPU cores (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import deepspeed
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from megadistill.engines.zero_parameter import ZeroParameter, partitioned_ones

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KEEPER = -1  # no module has this number
# Small parameters are gathered this many in a call; large ones, whose gathering is worth its call and which would be
# copied once more, by themselves.
_SMALL_BYTES, _TOGETHER = 2**22, 64


@contextmanager
def gathered_module(engine: deepspeed.DeepSpeedEngine, *, runs_forward: bool) -> Iterator[PreTrainedModel]:
    """The engine's model with all parameters present and read-only.

    Communicates once over the data-parallel group on entry (ZeRO-3), never in stages 0 to 2, where parameters are
    always present.

    Args:
        engine: The engine.
        runs_forward: The model's forward passes will run. ZeRO-3's hooks, which would gather and release parameters,
            are removed meanwhile (and DeepSpeed forgets in which order it gathers).
    """
    if engine.zero_optimization_stage() != 3:
        yield engine.module
        return
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    parameters = partitioned_ones(engine.module.parameters())
    with _gathered(parameters):
        for parameter in parameters:
            parameter.ds_active_sub_modules.clear()
        if not runs_forward:
            yield engine.module
            return
        for hook in offload.forward_hooks + offload.backward_hooks:
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield engine.module
        finally:
            offload._register_deepspeed_module(offload.module)


@contextmanager
def kept_parameters(parameters: Sequence[nn.Parameter | None]) -> Iterator[None]:
    """``gathered_parameters`` around forward and backward passes of the same engine.

    The passes find the parameters present and leave them so: one gathering for all of them.
    """
    partitioned = partitioned_ones(parameters)
    with gathered_parameters(partitioned):
        # ZeRO-3 releases what no module uses; this stands for a module that keeps using it.
        for parameter in partitioned:
            parameter.ds_active_sub_modules.add(_KEEPER)
        try:
            yield
        finally:
            for parameter in partitioned:
                parameter.ds_active_sub_modules.discard(_KEEPER)


@contextmanager
def gathered_parameters(parameters: Sequence[nn.Parameter | None]) -> Iterator[None]:
    """Some parameters of a ZeRO-3 engine, present and read-only.

    Communicates once over the data-parallel group on entry; does nothing for ordinary parameters.
    """
    partitioned = partitioned_ones(parameters)
    if not partitioned:
        yield
        return
    with _gathered(partitioned):
        yield


@contextmanager
def _gathered(partitioned: Sequence[ZeroParameter]) -> Iterator[None]:
    """``deepspeed.zero.GatheredParameters``, but small parameters are gathered many in one call.

    DeepSpeed's own gathers one parameter after the other, and never from secondary partitions.
    """
    missing = [p for p in partitioned if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    for has_secondary in (False, True):  # a call takes all of its parameters from the same kind of partition
        these = [p for p in missing if (p.ds_secondary_tensor is not None) == has_secondary]
        small = [p for p in these if p.ds_numel * p.element_size() <= _SMALL_BYTES]
        calls = [small[start : start + _TOGETHER] for start in range(0, len(small), _TOGETHER)]
        if has_secondary:
            calls += [[p] for p in these if p.ds_numel * p.element_size() > _SMALL_BYTES]
        for together in calls:
            together[0].all_gather_coalesced(together).wait()
    with deepspeed.zero.GatheredParameters(list(partitioned), modifier_rank=None):
        yield
