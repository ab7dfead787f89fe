"""Layouts that were not asked for: all that fit, by predicted time, and the nearest one to what does not fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megadistill.config.parallel import ZeroSection
from megadistill.errors import ConfigError
from megadistill.parallel.topology import divisors
from megadistill.planning.case import Case
from megadistill.planning.formulas import step_use
from megadistill.planning.gpus import Gpu
from megadistill.planning.storage import PROCESS_BYTES, host_while_saving
from megadistill.planning.times import phase_times, step_seconds
from megadistill.planning.use import StepUse

# What the caching allocator loses to fragmentation, and what it does not see: the CUDA context, the buffers of NCCL for
# three or four groups, the workspaces of cuBLAS. [est]
FRAGMENTATION, OUTSIDE_BYTES = 1.10, 1_500_000_000
# What the heap of a process on a CPU keeps of small tensors that were freed (tools/benchmark.py memory).
HEAP = 1.05

TP, ZERO = "parallel.tp_size", "parallel.zero_stage"
MICRO, BUDGET = "train.micro_batch_size", "train.micro_batch_tokens"
CHECKPOINTING, CACHE = "model.gradient_checkpointing", "generation.max_cache_bytes"
HPZ = "parallel.zero.hpz_partition_size"
_MOST_TIMES_NODES = 8
_NODES_ARE_WORTH = 10  # changed settings: another machine is the last thing to suggest


def step_bytes(case: Case, use: StepUse) -> int:
    """Bytes that a step needs, with what the predicted peak leaves out: of a GPU, or of a process on a CPU."""
    if case.like_gpu:
        return int(use.peak * FRAGMENTATION) + OUTSIDE_BYTES
    return int(use.peak * HEAP) + PROCESS_BYTES


def needed_bytes(case: Case, use: StepUse) -> int:
    """Bytes that a rank needs of its device: a step, and on a CPU the copies from which a checkpoint is written."""
    if case.like_gpu:
        return step_bytes(case, use)
    saving = sum(use.resident.values()) + host_while_saving(case)
    return max(step_bytes(case, use), int(saving * HEAP) + PROCESS_BYTES)


def fits(case: Case, use: StepUse) -> bool:
    """Whether a rank has the memory that a step needs."""
    return needed_bytes(case, use) <= case.gpu_memory


@dataclass(frozen=True)
class Candidate:
    """A layout that fits.

    Attributes:
        case: The run with it.
        use: What a rank uses.
        seconds: Predicted seconds of a step.
    """

    case: Case
    use: StepUse
    seconds: float

    def settings(self) -> dict[str, Any]:
        """Its settings, by key."""
        return _settings(self.case)


def _settings(case: Case) -> dict[str, Any]:
    config, train = case.config, case.config.train
    micro = {MICRO: train.micro_batch_size} if train.micro_batch_tokens is None else {BUDGET: train.micro_batch_tokens}
    return {
        TP: case.tp_size,
        ZERO: case.zero_stage,
        **micro,
        CHECKPOINTING: config.model.gradient_checkpointing,
        CACHE: config.generation.max_cache_bytes,
    }


def changes(case: Case, to: Case) -> dict[str, Any]:
    """Key -> value of the settings in which ``to`` differs; ``--nodes`` among them."""
    before, after = _settings(case), _settings(to)
    nodes = {} if to.nodes == case.nodes else {"--nodes": to.nodes}
    return nodes | {key: value for key, value in after.items() if value != before[key]} | _of_zero(case, to)


def _of_zero(case: Case, to: Case) -> dict[str, Any]:
    before, after = (each.config.parallel.zero.model_dump() for each in (case, to))
    return {f"parallel.zero.{name}": value for name, value in after.items() if value != before[name]}


def left_out(case: Case, layouts: Sequence[Candidate]) -> str | None:
    """A line about settings of the run that some layouts do without, because their ZeRO stage refuses them."""
    keys = sorted({key for found in layouts for key in _of_zero(case, found.case)} - {HPZ})
    if not keys:
        return None
    return f"layouts of ZeRO stages that do not use {', '.join(keys)} are planned, and must be run, without it"


def sweep(case: Case, gpu: Gpu, factors: Mapping[str, float] | None = None) -> list[Candidate]:
    """All layouts of tp, dp, ZeRO stage, micro-batch and checkpointing on the given machines that fit, fastest first.

    Args:
        case: The run and the machines.
        gpu: The GPU.
        factors: As of ``phase_times``.
    """
    found = [candidate for candidate in _fitting(_layouts(case), gpu, factors)]
    return sorted(found, key=lambda candidate: (candidate.seconds, candidate.use.peak))


def nearest(case: Case, gpu: Gpu, factors: Mapping[str, float] | None = None) -> Candidate | None:
    """The layout that fits with the fewest changed settings, the fastest of these; None where none fits.

    Tried are checkpointing, smaller micro-batches and caches, other tensor-parallel sizes, higher ZeRO stages, and up
    to eight times the machines.

    Args:
        case: A run that does not fit.
        gpu: The GPU.
        factors: As of ``phase_times``.
    """
    before = _settings(case)
    times_nodes = 1
    while times_nodes <= _MOST_TIMES_NODES:
        wide = case.with_settings({}, nodes=case.nodes * times_nodes)
        tried = (
            layout.with_settings({CACHE: before[CACHE] // part})
            for layout in _layouts(wide)
            for part in (1, 4)
            if all(_settings(layout)[key] <= before[key] for key in (MICRO, BUDGET) if key in before)
            and layout.zero_stage >= before[ZERO]
            and layout.config.model.gradient_checkpointing >= before[CHECKPOINTING]
        )
        found = list(_fitting(tried, gpu, factors))
        if found:
            return min(found, key=lambda candidate: (len(changes(case, candidate.case)), candidate.seconds))
        times_nodes *= 2
    return None


def _layouts(case: Case) -> Iterator[Case]:
    """Every layout of a run on its machines; groups of tensor parallelism stay within a machine.

    Keys of ``parallel.zero`` that a stage refuses have their defaults in its layouts.
    """
    global_batch = case.config.train.global_batch_size
    counts = case.models.head_counts().values()
    for tp_size in divisors(case.gpus_per_node):
        dp_size = case.world_size // tp_size
        if any(count % tp_size for count in counts) or global_batch % dp_size:
            continue
        # Alone in its group, a rank has nothing to partition.
        stages = range(4) if dp_size > 1 else [case.zero_stage]
        for stage, micro_batch in itertools.product(stages, _micro_batches(case, global_batch // dp_size)):
            plain = case.with_settings({TP: tp_size, ZERO: stage, **micro_batch, **_defaults(case, stage)})
            sizes = [size for size in (plain.hpz_size, 1) if dp_size % size == 0]
            for size, is_checkpointed in itertools.product(dict.fromkeys(sizes), (False, True)):
                yield plain.with_settings({HPZ: size, CHECKPOINTING: is_checkpointed})


def _micro_batches(case: Case, examples: int) -> list[dict[str, int]]:
    """Settings of the passes of so many examples of a rank; a budget of tokens takes the place of a number of rows."""
    budget, of_example = case.config.train.micro_batch_tokens, case.columns * case.sequences_of_example
    if budget is None:
        return [{MICRO: rows} for rows in divisors(examples)]
    return [{BUDGET: tokens} for tokens in sorted({budget, *(rows * of_example for rows in divisors(examples))})]


def _defaults(case: Case, stage: int) -> dict[str, Any]:
    """The settings of ``parallel.zero`` that another stage refuses, as they are where nobody sets them."""
    parallel = case.config.parallel.model_copy(update={"zero_stage": stage})
    fields = ZeroSection.model_fields
    return {f"parallel.zero.{name}": fields[name].default for name, _ in parallel.without_effect()}


def _fitting(layouts: Iterator[Case], gpu: Gpu, factors: Mapping[str, float] | None) -> Iterator[Candidate]:
    for layout in layouts:
        try:
            layout.check()
        except ConfigError:  # one example does not fit the cache
            continue
        use = step_use(layout)
        if fits(layout, use):
            yield Candidate(layout, use, step_seconds(phase_times(layout, use, gpu, factors)))
