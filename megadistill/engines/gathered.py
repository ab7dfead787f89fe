"""Parameters of a ZeRO-3 engine held whole (this rank's tensor-parallel shard of them) for a while.

Decoding token by token through ZeRO-3 gathers every parameter for every token. Gathering once around the whole
rollout and taking ZeRO's module hooks off meanwhile was five times faster on two CPU cores (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import deepspeed
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

_KEEPER = -1  # no module has this number
# Small parameters are gathered this many in a call; large ones, whose gathering is worth its call and which would be
# copied once more, by themselves.
_SMALL_BYTES, _TOGETHER = 2**22, 64


@contextmanager
def gathered_module(engine: deepspeed.DeepSpeedEngine, *, runs_forward: bool) -> Iterator[nn.Module]:
    """The engine's module with all parameters present; read-only.

    ``runs_forward``: the module's forward passes will run, so ZeRO-3's hooks, which would gather and release, are taken
    off meanwhile (and DeepSpeed forgets the order of its gatherings). Communicates once over the data-parallel group on
    entry (ZeRO-3), never in stages 0-2, where parameters are present.
    """
    if engine.zero_optimization_stage() != 3:
        yield engine.module
        return
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    parameters = list(engine.module.parameters())
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
    """`gathered_parameters` around forward and backward passes of the same engine, which find the parameters present
    and leave them so: one gathering for all of them."""
    partitioned = [p for p in parameters if p is not None and hasattr(p, "ds_id")]
    with gathered_parameters(partitioned):
        # ZeRO-3 releases what no module is using; this stands for one that goes on using it.
        for parameter in partitioned:
            parameter.ds_active_sub_modules.add(_KEEPER)
        try:
            yield
        finally:
            for parameter in partitioned:
                parameter.ds_active_sub_modules.discard(_KEEPER)


@contextmanager
def gathered_parameters(parameters: Sequence[nn.Parameter | None]) -> Iterator[None]:
    """Some parameters of a ZeRO-3 engine present and read-only; nothing to do for ordinary parameters."""
    partitioned = [p for p in parameters if p is not None and hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    with _gathered(partitioned):
        yield


@contextmanager
def _gathered(partitioned: Sequence[nn.Parameter]) -> Iterator[None]:
    """``deepspeed.zero.GatheredParameters``, which gathers one parameter after the other, with the small ones
    gathered before, many in one call."""
    missing = [p for p in partitioned if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    small = [p for p in missing if p.ds_numel * p.element_size() <= _SMALL_BYTES]
    for start in range(0, len(small), _TOGETHER):
        part = small[start : start + _TOGETHER]
        part[0].all_gather_coalesced(part).wait()
    with deepspeed.zero.GatheredParameters(list(partitioned), modifier_rank=None):
        yield
