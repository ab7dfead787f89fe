"""Which samples go through the student together: the forward and backward passes of a step.

Losses are sums divided by counts of the whole step, so the split changes them by round-off alone. It is a function of
the lengths, so a resumed run has it again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megadistill.config.train import TrainSection
from megadistill.data.sample import Sample
from megadistill.parallel.context import ParallelContext
from megadistill.training.micro_batch import sequences_of


def plan_passes(samples: Sequence[Sample], train: TrainSection, context: ParallelContext) -> list[list[int]]:
    """Splits the samples of this rank, the longest ones first, so that a lack of memory shows at once.

    With ``micro_batch_tokens`` ranks may need different numbers of passes; all get the largest one (one all-reduce),
    because under ZeRO-3 every pass gathers parameters. What they have more of is empty.

    Args:
        samples: The samples of this rank.
        train: How much a pass takes, and whether it has padding.
        context: The grid of processes.

    Returns:
        For each pass the indices of its samples.
    """
    lengths = [[len(prompt) + len(response) for prompt, response in sequences_of(sample)] for sample in samples]
    if train.micro_batch_tokens is None:
        return passes_of_equal_size(lengths, train.micro_batch_size, padding_free=train.padding_free)
    passes = passes_within_budget(lengths, train.micro_batch_tokens, padding_free=train.padding_free)
    number = torch.tensor(len(passes), device=context.device)
    return passes + [[] for _ in range(int(context.max_over_world(number)) - len(passes))]


def passes_of_equal_size(lengths: Sequence[Sequence[int]], size: int, *, padding_free: bool) -> list[list[int]]:
    """Equally many samples a pass; ``size`` divides their number.

    With padding, neighbors in length share a pass. Without, every pass gets long and short ones, so that all take about
    as much memory.

    Args:
        lengths: Of each sample's sequences.
        size: Samples of a pass.
        padding_free: Whether the passes have no padding.
    """
    order = _longest_first(lengths, padding_free)
    number = len(order) // size
    if padding_free:
        return [order[i::number] for i in range(number)]
    return [order[i * size : (i + 1) * size] for i in range(number)]


def passes_within_budget(lengths: Sequence[Sequence[int]], budget: int, *, padding_free: bool) -> list[list[int]]:
    """As many samples a pass as fit into ``budget`` columns, and at least one.

    Args:
        lengths: Of each sample's sequences; none for a sample without a loss.
        budget: Columns of a pass, padding included.
        padding_free: Whether the passes have no padding.
    """
    passes: list[list[int]] = []
    for i in _longest_first(lengths, padding_free):
        if not passes or (lengths[i] and _columns([lengths[j] for j in [*passes[-1], i]], padding_free) > budget):
            passes.append([])
        passes[-1].append(i)
    return passes


def _longest_first(lengths: Sequence[Sequence[int]], padding_free: bool) -> list[int]:
    """Samples by what decides the size of a pass: all their tokens, or with padding the longest sequence."""
    size = [sum(sample) if padding_free else max(sample, default=0) for sample in lengths]
    return sorted(range(len(lengths)), key=lambda i: (-size[i], i))


def _columns(lengths: Sequence[Sequence[int]], padding_free: bool) -> int:
    """Columns of a pass with these samples."""
    together = [length for sample in lengths for length in sample]
    return sum(together) if padding_free else len(together) * max(together, default=0)
