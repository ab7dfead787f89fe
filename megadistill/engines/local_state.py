"""What this rank holds of every parameter: the places in DeepSpeed's flat tensors, whatever the ZeRO stage.

The only file that looks inside DeepSpeed's optimizers. All tensors are flat views into them: reading one is a
snapshot to be cloned, copying into one restores it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from megadistill.engines.zero_parameter import ZeroParameter, as_partitioned
from megadistill.models.shards import MASTER, MOMENTS


@dataclass(frozen=True)
class LocalPart:
    """The run [start, start + numel) of this rank's tensor-parallel shard of a parameter, as its optimizer holds it.

    Attributes:
        name: Name of the parameter.
        start: First element in the flat shard.
        numel: Number of elements.
        is_shared: Every data-parallel rank holds the same (ZeRO stage 0).
        tensors: Kind -> flat view [numel]: float32 master weight and AdamW's two moments.
    """

    name: str
    start: int
    numel: int
    is_shared: bool
    tensors: dict[str, torch.Tensor]


def shard_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Shape of this rank's tensor-parallel shard, whose data ZeRO-3 may have taken away."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def local_parts(engine: deepspeed.DeepSpeedEngine) -> Iterator[LocalPart]:
    """All parts that this rank's optimizer updates (nothing of what is frozen), in the order of the model's parameters.

    AdamW's moments are made where it has not made them yet. No communication.
    """
    flats, find = _finder(engine)
    base = _base(engine)
    for flat in flats:  # also those of which this rank holds nothing but padding: AdamW counts updates in each
        _adamw_state(base, flat)
    for name, parameter in engine.module.named_parameters():
        place = find(parameter) if parameter.requires_grad else None
        if place is None:
            continue
        state = _adamw_state(base, place.flat)
        tensors = {MASTER: place.flat.detach(), **{kind: state[kind] for kind in MOMENTS}}
        runs = {kind: tensor.reshape(-1).narrow(0, place.offset, place.numel) for kind, tensor in tensors.items()}
        yield LocalPart(name, place.start, place.numel, place.is_shared, runs)


def optimizer_tensors(engine: deepspeed.DeepSpeedEngine) -> Iterator[torch.Tensor]:
    """What only an update needs: float32 copies of the weights, and AdamW's moments as far as it has made them."""
    flats, _ = _finder(engine)
    base, weights = _base(engine), {id(parameter) for parameter in engine.module.parameters()}
    for flat in flats:
        if id(flat) not in weights:  # stage 0 in float32 updates the weights themselves
            yield flat
        state = base.state.get(flat, {})
        yield from (state[kind] for kind in MOMENTS if kind in state)


def weight_tensors(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    """Where this rank keeps parameters: whole, or its runs of them; small ones that ZeRO-3 never releases left out."""
    tensors = []
    for parameter in parameters:
        partitioned = as_partitioned(parameter)
        if partitioned is None:
            tensors.append(parameter.data)
        elif not partitioned.ds_persist:
            tensors.append(partitioned.ds_tensor)
    return tensors


def kept_tensors(engine: deepspeed.DeepSpeedEngine) -> dict[str, list[torch.Tensor]]:
    """What an engine keeps between steps, by what it is; kinds that its ZeRO stage does not have are absent.

    Returns:
        "weights": what forward passes read; "optimizer": masters and moments; "gradients": where they are summed;
        "bucket": what they are reduced through.
    """
    weights = []
    for parameter in engine.module.parameters():
        partitioned = as_partitioned(parameter)
        weights += [parameter.data] if partitioned is None else [parameter.data, partitioned.ds_tensor]
    optimizer = engine.optimizer
    kept: dict[str, list[torch.Tensor]] = {"weights": weights}
    if optimizer is None or not hasattr(_base(engine), "state"):  # of a model that is never trained
        return kept
    base = _base(engine)
    flats = [flat for group in base.param_groups for flat in group["params"]]
    ids = {id(parameter) for parameter in engine.module.parameters()}
    masters = [flat.data for flat in flats if id(flat) not in ids]
    moments = [x for state in base.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    kept["optimizer"] = [*masters, *getattr(optimizer, "fp32_partitioned_groups_flat", []), *moments]
    flat = getattr(optimizer, "grad_partitions_flat_buffer", None)  # stage 3
    # Stage 1 with bfloat16 weights and float32 gradients: those of all parameters, all the time.
    kept["gradients"] = getattr(optimizer, "fp32_groups_gradients_flat", []) if flat is None else [flat]
    kept["bucket"] = [x.buffer for x in getattr(optimizer, "ipg_buckets", {}).values() if torch.is_tensor(x.buffer)]
    return kept


def optimizer_steps(engine: deepspeed.DeepSpeedEngine) -> int:
    """Updates that AdamW has made."""
    steps = {int(state["step"]) for state in _base(engine).state.values() if state}
    assert len(steps) <= 1, f"AdamW's parameters have made different numbers of updates: {sorted(steps)}"
    return steps.pop() if steps else 0


def set_optimizer_steps(engine: deepspeed.DeepSpeedEngine, steps: int) -> None:
    """Restores AdamW's count of updates, which its bias correction needs."""
    for state in _base(engine).state.values():
        state["step"].fill_(steps)


@torch.no_grad()
def set_weights(parameter: nn.Parameter, read: Callable[[int, int], torch.Tensor]) -> None:
    """Fills a parameter's weights, as the forward pass sees them. No communication.

    Args:
        parameter: The parameter. ZeRO-3 copies only the run of it that this rank keeps.
        read: ``read(start, end)`` gives a run of this rank's flat tensor-parallel shard.
    """
    partitioned = as_partitioned(parameter)
    if partitioned is None:
        parameter.data.copy_(read(0, parameter.numel()).view(parameter.shape))
        return
    kept, start = partitioned.ds_tensor, _run_start(partitioned)
    end = min(start + kept.numel(), partitioned.ds_numel)
    if partitioned.ds_status == ZeroParamStatus.AVAILABLE:  # small ones stay present on every rank
        whole = read(0, partitioned.ds_numel)
        parameter.data.copy_(whole.view(parameter.shape))
        run = whole[start:end]
    else:
        run = read(start, end) if start < end else kept.data[:0]
    if start < end:
        kept.data[: end - start].copy_(run)


def _run_start(parameter: ZeroParameter) -> int:
    """First element of the run that this rank keeps."""
    return torch.distributed.get_rank(parameter.ds_process_group) * parameter.ds_tensor.numel()


def _base(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    """The AdamW inside DeepSpeed's wrapper; stage 0 in float32 has no wrapper."""
    base: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return base


def _adamw_state(base: torch.optim.Optimizer, flat: torch.Tensor) -> dict[str, Any]:
    state: dict[str, Any] = base.state[flat]
    if not state:
        counts_on = flat.device if base.defaults["fused"] else "cpu"  # as torch makes it
        state |= {"step": torch.tensor(0.0, device=counts_on)} | {kind: torch.zeros_like(flat) for kind in MOMENTS}
    return state


class _Place(NamedTuple):
    """Where a parameter's local run is: [offset, offset + numel) of ``flat``, and from ``start`` on in its shard."""

    flat: torch.Tensor
    offset: int
    start: int
    numel: int
    is_shared: bool


# All flat tensors, and a function that finds a parameter's place in them (None: this rank holds nothing of it).
_Finder = tuple[list[torch.Tensor], Callable[[nn.Parameter], _Place | None]]


def _finder(engine: deepspeed.DeepSpeedEngine) -> _Finder:
    stage = engine.zero_optimization_stage()
    return {0: _whole_parts, 1: _fragments, 2: _fragments, 3: _partitions}[stage](engine)


def _whole_parts(engine: deepspeed.DeepSpeedEngine) -> _Finder:
    """Stage 0: whole parameters; in bfloat16 the optimizer keeps float32 copies."""
    optimizer, parameters = engine.optimizer, [p for p in engine.module.parameters() if p.requires_grad]
    masters: dict[int, torch.Tensor] = {id(parameter): parameter for parameter in parameters}
    if hasattr(optimizer, "fp32_groups"):
        pairs = zip(sum(optimizer.fp16_groups, []), sum(optimizer.fp32_groups, []), strict=True)
        masters |= {id(low): high for low, high in pairs}
    return list(masters.values()), lambda p: _Place(masters[id(p)], 0, 0, p.numel(), True)


def _fragments(engine: deepspeed.DeepSpeedEngine) -> _Finder:
    """Stages 1 and 2: each rank updates a run of a flat group of parameters, which may begin and end within one."""
    # Stage 1 with bfloat16 weights and float32 gradients is another class of DeepSpeed's.
    names = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    flats = next(getattr(engine.optimizer, name) for name in names if hasattr(engine.optimizer, name))

    def find(parameter: nn.Parameter) -> _Place | None:
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed puts it there
        if mapping is None:
            return None
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return _Place(flats[mapping.param_group_index], here.start, there.start, there.numel, False)

    return flats, find


def _partitions(engine: deepspeed.DeepSpeedEngine) -> _Finder:
    """Stage 3: each rank updates an equal run of each parameter; the last runs are filled up with zeros."""
    optimizer, flats = engine.optimizer, engine.optimizer.fp32_partitioned_groups_flat

    def find(parameter: nn.Parameter) -> _Place | None:
        partitioned = as_partitioned(parameter)
        assert partitioned is not None
        group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = _run_start(partitioned)
        numel = min(int(numel), partitioned.ds_numel - start)
        return _Place(flats[group], int(offset), start, numel, False) if numel > 0 else None

    return flats, find
