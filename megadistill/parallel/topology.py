"""Which numbers of processes, examples and heads fit together. No torch: launchers and plans use it too.

Tensor-parallel ranks are consecutive: ``rank = dp_rank * tp_size + tp_rank``.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from megadistill.errors import TopologyError


def resolve_tp_size(tp_size: int | Literal["auto"], world_size: int, head_counts: Mapping[str, int]) -> int:
    """The tensor-parallel size of a run.

    Args:
        tp_size: The setting; "auto" is the largest divisor of ``world_size`` that divides every head count.
        world_size: Number of processes.
        head_counts: Attention and key-value heads of all models that are sharded, by what they are ("key-value heads
            of the student").

    Raises:
        TopologyError: A given size does not divide one of them.
    """
    sizes = divisors(math.gcd(world_size, *head_counts.values()))
    if tp_size == "auto":
        return sizes[-1]
    if world_size % tp_size:
        raise TopologyError(
            f"a tensor-parallel size of {tp_size} does not divide the number of processes, {world_size}; "
            f"allowed with these models: {_listed(sizes)}",
            setting="parallel.tp_size",
        )
    if tp_size not in sizes:
        undivided = ", ".join(f"the {count} {heads}" for heads, count in head_counts.items() if count % tp_size)
        raise TopologyError(
            f"a tensor-parallel size of {tp_size} does not divide {undivided}; "
            f"allowed with {world_size} processes: {_listed(sizes)}",
            setting="parallel.tp_size",
        )
    return tp_size


def gradient_accumulation_steps(global_batch_size: int, micro_batch_size: int, dp_size: int) -> int:
    """Micro-steps of a step on every data-parallel rank.

    Args:
        global_batch_size: Examples of a step.
        micro_batch_size: Examples of a micro-step on one rank.
        dp_size: Number of data-parallel ranks.

    Raises:
        TopologyError: The examples do not come out even.
    """
    if global_batch_size % dp_size:
        raise TopologyError(
            f"a global batch of {global_batch_size} examples cannot be shared by {dp_size} data-parallel ranks; "
            f"the nearest that can, in micro-batches of {micro_batch_size}: "
            f"{_listed(_nearest_multiples(global_batch_size, dp_size * micro_batch_size))}",
            setting="train.global_batch_size, train.micro_batch_size",
        )
    examples = global_batch_size // dp_size
    if examples % micro_batch_size:
        raise TopologyError(
            f"a global batch of {global_batch_size} examples over {dp_size} data-parallel ranks is {examples} examples "
            f"per rank, not a multiple of the micro-batch size {micro_batch_size}; "
            f"allowed: {_listed(divisors(examples))}",
            setting="train.global_batch_size, train.micro_batch_size",
        )
    return examples // micro_batch_size


def check_hpz_size(size: int, dp_size: int) -> None:
    """Raises TopologyError where a secondary partition over ``size`` ranks does not divide the data-parallel ranks."""
    if dp_size % size:
        raise TopologyError(
            f"a secondary partition over {size} ranks does not divide the number of data-parallel ranks, {dp_size}; "
            f"allowed: {_listed(divisors(dp_size))}",
            setting="parallel.zero.hpz_partition_size",
        )


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def _nearest_multiples(number: int, step: int) -> list[int]:
    below = number // step * step
    return [multiple for multiple in (below, below + step) if multiple > 0]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)
