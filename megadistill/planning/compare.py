"""Two accounts of one rank's step side by side: closed formulas and a dry run, or either and a real run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megadistill.evaluation.report import text_table
from megadistill.planning.use import GROUPS, Group, PhaseUse, StepUse

_GB = 1e9


@dataclass(frozen=True)
class Difference:
    """One number of both.

    Attributes:
        what: Its name: "peak of train", "all_gather of dp in train, bytes" ...
        formula: By the formulas.
        exact: By the dry run.
        is_memory: It is bytes of memory of a GPU.
    """

    what: str
    formula: float
    exact: float
    is_memory: bool = False

    def shown(self, value: float) -> str:
        """One of the numbers, for people."""
        return f"{value:,.0f}" if self.what.startswith("operations") else f"{value / _GB:.3f}"

    @property
    def ratio(self) -> float:
        """The formulas' number over the exact one; 1 where both are 0."""
        if self.exact == 0:
            return 1.0 if self.formula == 0 else float("inf")
        return self.formula / self.exact


@dataclass(frozen=True)
class Comparison:
    """All numbers that two accounts of a step have in common.

    Attributes:
        rows: The numbers.
    """

    rows: tuple[Difference, ...]

    def worst_memory(self) -> Difference:
        """The row of memory that differs most."""
        return max((row for row in self.rows if row.is_memory), key=lambda row: abs(row.ratio - 1))

    def __str__(self) -> str:
        cells = [
            (row.what, *map(row.shown, (row.formula, row.exact)), f"{100 * (row.ratio - 1):+.1f} %")
            for row in self.rows
        ]
        return text_table(("memory and traffic in GB, FLOPs in 10^9", "formulas", "exact", "off"), cells)


def compare(formula: StepUse, exact: StepUse) -> Comparison:
    """Compares two accounts of the same layout, phase by phase.

    Args:
        formula: The closed formulas.
        exact: A dry run or a real run.
    """
    sizes = {"tp": exact.tp_size, "dp": exact.world_size // exact.tp_size}
    groups = [group for group in GROUPS if sizes.get(group) != 1]  # alone in its group, a rank sends nothing
    rows = [Difference("resident", sum(formula.resident.values()), sum(exact.resident.values()), is_memory=True)]
    others = {phase.name: phase for phase in exact.phases}
    for phase in formula.phases:
        other = others.get(phase.name)
        if other is not None:
            rows += _phase_rows(phase, other, groups)
    return Comparison(tuple(rows))


def _phase_rows(formula: PhaseUse, exact: PhaseUse, groups: Sequence[Group]) -> list[Difference]:
    name = formula.name
    rows = [Difference(f"peak of {name}", formula.peak, exact.peak, is_memory=True)]
    if formula.flops or exact.flops:
        rows.append(Difference(f"FLOPs of {name}", formula.flops, exact.flops))
    if formula.operations:
        rows.append(Difference(f"operations of {name}", formula.operations, exact.operations))
    for group in groups:
        ours, theirs = (sum(t.bytes for t in phase.traffic if t.group == group) for phase in (formula, exact))
        if ours or theirs:
            rows.append(Difference(f"traffic of {group} in {name}", ours, theirs))
    return rows
