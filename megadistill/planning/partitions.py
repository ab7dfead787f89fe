"""Closed formulas for what ZeRO leaves of parameters on one rank."""

from __future__ import annotations

from collections.abc import Sequence

from megadistill.planning.case import Case
from megadistill.planning.shape import ModelShape


def partition_size(case: Case) -> int:
    """Elements that this rank's optimizer updates."""
    if case.zero_stage == 0:
        return case.student.num_trained
    return partitioned(case.student.trained, case.dp_size)


def partitioned(sizes: Sequence[int], dp_size: int) -> int:
    """Elements of one rank, of parameters of these sizes."""
    return sum(-(-size // dp_size) for size in sizes)


def weights(case: Case, model: ModelShape, itemsize: int, *, keeps_small: bool = True) -> int:
    """Bytes of weights between steps. The teacher's small ones are released too: its engine runs no forward pass."""
    if case.zero_stage < 3:
        return itemsize * model.size
    return itemsize * (partitioned(model.sizes, case.dp_size) + (persistent(case, model) if keeps_small else 0))


def secondary(case: Case, model: ModelShape, itemsize: int) -> int:
    """Bytes of the partitions that few ranks keep (engines/secondary_partition.py): the student's until its update."""
    return itemsize * partitioned(model.sizes, case.hpz_size) if case.hpz_size > 1 else 0


def persistent(case: Case, model: ModelShape) -> int:
    """Elements of the parameters that ZeRO-3 never releases."""
    return model.size - sum(released(case, model)) if case.zero_stage == 3 and case.dp_size > 1 else 0


def released(case: Case, model: ModelShape) -> list[int]:
    """Elements of each parameter that ZeRO-3 releases after its use."""
    limit = case.config.parallel.zero.param_persistence_threshold
    return [size for size in model.sizes if size > limit]


def trained_persistent(case: Case) -> int:
    """Elements of the trained parameters that ZeRO-3 never releases."""
    limit = case.config.parallel.zero.param_persistence_threshold
    return sum(size for size in case.student.trained if size <= limit)
