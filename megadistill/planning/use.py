"""What one rank uses in one step: the record that a dry run, the formulas, and a measured run all fill in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

PHASES = ("rollout", "teacher", "score", "regenerate", "train", "optimizer")
# hpz: the data-parallel ranks, fewer than all, that keep the weights once more.
Group = Literal["tp", "dp", "hpz", "world"]
GROUPS: tuple[Group, ...] = ("tp", "dp", "hpz")  # of which a run knows what they send


@dataclass(frozen=True)
class Traffic:
    """Collective calls of one kind.

    Attributes:
        group: Who takes part.
        op: The collective, such as "all_reduce", "all_gather", "reduce_scatter", "broadcast".
        calls: How often this rank calls it.
        bytes: What it hands in or receives in all calls together: the larger of a call's input and output.
    """

    group: Group
    op: str
    calls: int
    bytes: int


@dataclass(frozen=True)
class PhaseUse:
    """One phase of a step, named as its timer is (``time/NAME`` in metrics.jsonl).

    Attributes:
        name: One of ``PHASES``.
        peak: Bytes alive at the fullest moment of the phase, what is resident included.
        owners: Owner ("teacher weights", "kv cache", "activations" ...) -> bytes at that moment; they sum to ``peak``.
        flops: Floating-point operations of products and attention on this rank.
        operations: Operations that torch dispatches, which on a GPU are launches; views are not counted. Formulas say 0
            for CPUs, where there are others.
        traffic: The collective calls.
    """

    name: str
    peak: int
    owners: Mapping[str, int]
    flops: int
    operations: int
    traffic: tuple[Traffic, ...] = ()


@dataclass(frozen=True)
class StepUse:
    """One rank's step.

    Attributes:
        source: How the numbers came about: closed formulas, a dry run of the real step, or a real run that was counted.
        rank: The rank.
        world_size: Processes in all.
        tp_size: Tensor-parallel size.
        zero_stage: ZeRO stage.
        resident: Owner -> bytes alive between steps, from the second step on.
        phases: The phases in the order in which they run.
        decode_steps: Tokens that were decoded one after the other, in all decode batches: what launches scale with.
        assumptions: What was taken for granted, one line each, for people.
    """

    source: Literal["formulas", "dry run", "measured"]
    rank: int
    world_size: int
    tp_size: int
    zero_stage: int
    resident: Mapping[str, int]
    phases: tuple[PhaseUse, ...]
    decode_steps: int
    assumptions: tuple[str, ...] = field(default=())

    @property
    def peak(self) -> int:
        """Bytes alive at the fullest moment of the step."""
        return max(phase.peak for phase in self.phases)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"peak": self.peak}
