"""A plan as text of one screen, as JSON, and as the bars of a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megadistill.evaluation.report import text_table
from megadistill.planning.case import Case
from megadistill.planning.compare import Comparison
from megadistill.planning.gpus import Gpu
from megadistill.planning.memory import OWNERS
from megadistill.planning.search import (
    BUDGET,
    CHECKPOINTING,
    FRAGMENTATION,
    HEAP,
    HPZ,
    MICRO,
    OUTSIDE_BYTES,
    TP,
    ZERO,
    Candidate,
    changes,
    needed_bytes,
)
from megadistill.planning.storage import PROCESS, PROCESS_BYTES, host_while_loading, host_while_saving
from megadistill.planning.times import PhaseTime, crosses_nodes, rate_assumptions, step_seconds
from megadistill.planning.use import GROUPS, StepUse

_GB, _WIDTH, _SHOWN_LAYOUTS, _SHOWN_OWNERS = 1e9, 118, 20, 14


@dataclass(frozen=True)
class Plan:
    """All that a plan has found out.

    Attributes:
        case: The run and the machines.
        gpu: The GPU.
        use: What a rank uses.
        times: Phase -> its seconds.
        notes: What was taken for granted before the formulas.
        comparison: Formulas beside the dry run, where there was one.
        nearest: The nearest layout that fits; None where the planned one fits, or none does.
        layouts: All layouts that fit, where they were asked for.
    """

    case: Case
    gpu: Gpu
    use: StepUse
    times: Mapping[str, PhaseTime]
    notes: Sequence[str] = ()
    comparison: Comparison | None = None
    nearest: Candidate | None = None
    layouts: Sequence[Candidate] | None = None

    @property
    def is_fitting(self) -> bool:
        """Whether the planned layout fits."""
        return needed_bytes(self.case, self.use) <= self.case.gpu_memory

    @property
    def seconds(self) -> float:
        """Predicted seconds of a step."""
        return step_seconds(self.times)

    def assumptions(self) -> list[str]:
        """What was taken for granted, for people."""
        measured = {name: time.factor for name, time in self.times.items() if time.factor != 1.0}
        lines = [*self.notes, *self.use.assumptions, *rate_assumptions(self.case, self.gpu)]
        if measured:
            factors = ", ".join(f"{name} {factor:.2f}" for name, factor in measured.items())
            lines.append(f"measured over predicted seconds, by which times are multiplied: {factors}")
        if self.case.like_gpu:
            lines.append(
                f"[est] needed memory = peak x {FRAGMENTATION:.2f} (fragmentation) + {OUTSIDE_BYTES / _GB:g} GB (CUDA "
                "context, NCCL, cuBLAS)"
            )
        else:
            lines.append(
                f"needed memory = (peak, or what is resident and a checkpoint's copies) x {HEAP:.2f} (what the heap "
                f"keeps) + {PROCESS_BYTES / _GB:g} GB of each process for Python and its libraries: measured, "
                "docs/planning.md"
            )
        return lines

    def memory(self) -> dict[str, Mapping[str, int]]:
        """Column of the table -> owner -> bytes."""
        tables = {"resident": self.use.resident} | {phase.name: phase.owners for phase in self.use.phases}
        outside = {} if self.case.like_gpu else {PROCESS: PROCESS_BYTES}
        return {name: {**outside, **owners} for name, owners in tables.items()}


def text(plan: Plan) -> str:
    """The whole plan for a terminal."""
    if plan.layouts is not None:
        return f"{_headline(plan)}\n\n{_layouts(plan.layouts)}\n\n{_bullets(plan.assumptions())}"
    parts = [_headline(plan), _memory(plan.memory()), _phases(plan), _verdict(plan)]
    if plan.comparison is not None:
        parts.append(str(plan.comparison))
    return "\n\n".join([*parts, _bullets(plan.assumptions())])


def _headline(plan: Plan) -> str:
    case, config = plan.case, plan.case.config
    of_models = [f"student {_billions(case.models.student.size)}"]
    if case.models.teacher is not None:
        of_models.insert(0, f"teacher {_billions(case.models.teacher.size)}")
    layout = "" if plan.layouts is not None else (
        f"; tp {case.tp_size} x dp {case.dp_size}, ZeRO-{case.zero_stage}, {_micro_batch(case)}"
        f"{', checkpointed' if config.model.gradient_checkpointing else ''}"
    )  # fmt: skip
    source = {"formulas": "by formulas", "dry run": "by a dry run of the code", "measured": "measured"}[plan.use.source]
    return (
        f"{' -> '.join(of_models)}: {config.train.global_batch_size} examples a step on {case.nodes} x "
        f"{case.gpus_per_node} {plan.gpu.name} of {case.gpu_memory / _GB:.3g} GB{layout}; rank 0, {source}"
    )


def _micro_batch(case: Case) -> str:
    train = case.config.train
    if train.micro_batch_tokens is None:
        return f"micro-batch {train.micro_batch_size}"
    return f"micro-batches of {train.micro_batch_tokens} tokens ({case.rows} examples)"


def _billions(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e8 else f"{parameters / 1e6:.2f}M"


def _memory(columns: Mapping[str, Mapping[str, int]]) -> str:
    """Owner by phase, in GB."""
    tables = list(columns.values())
    found = {owner for table in tables for owner in table}
    known = [owner for owner in (PROCESS, *OWNERS) if owner in found]
    owners = [*known, *sorted(found - set(known), key=lambda owner: -max(table.get(owner, 0) for table in tables))]
    shown, rest = owners[:_SHOWN_OWNERS], owners[_SHOWN_OWNERS:]
    header = ("memory, GB", *columns)
    rows: list[list[object]] = [[owner, *(_gb(table.get(owner, 0)) for table in tables)] for owner in shown]
    if rest:
        rows.append(["others", *(_gb(sum(table.get(owner, 0) for owner in rest)) for table in tables)])
    rows.append(["sum", *(_gb(sum(table.values())) for table in tables)])
    return text_table(header, rows)


def _gb(num_bytes: int) -> str:
    if num_bytes == 0:
        return "-"
    return f"{num_bytes / _GB:.2f}" if num_bytes >= 5e7 else f"{num_bytes / _GB:.4f}"


def _phases(plan: Plan) -> str:
    case, rows = plan.case, []
    groups = [g for g in GROUPS if g != "hpz" or any(t.group == g for p in plan.use.phases for t in p.traffic)]
    for phase in plan.use.phases:
        time = plan.times[phase.name]
        sent = {group: sum(t.bytes for t in phase.traffic if t.group == group) for group in groups}
        calls = {group: sum(t.calls for t in phase.traffic if t.group == group) for group in groups}
        traffic = [f"{_gb(sent[group])} in {calls[group]}" if calls[group] else "-" for group in groups]
        rows.append(
            [phase.name, phase.flops / 1e12, phase.operations or "-", *traffic, f"{time.seconds:.3f}", time.bound]
        )
    rows.append(["sum", sum(p.flops for p in plan.use.phases) / 1e12, sum(p.operations for p in plan.use.phases) or "-",
                 *[""] * len(groups), f"{plan.seconds:.3f}", ""])  # fmt: skip
    names = [f"{group}, GB{' across nodes' if crosses_nodes(case, group) else ''}" for group in groups]
    return text_table(("phase", "TFLOP", "launches", *names, "seconds", "mostly"), rows)


def _verdict(plan: Plan) -> str:
    case, steps = plan.case, plan.case.config.train.max_steps
    needed, fullest = needed_bytes(case, plan.use), max(plan.use.phases, key=lambda phase: phase.peak)
    words = "fits" if plan.is_fitting else "DOES NOT FIT"
    length = f", {steps} steps in {steps * plan.seconds / 3600:.1f} h" if steps is not None else ""
    ranks = case.gpus_per_node
    lines = [
        f"{words}: needs {needed / _GB:.1f} of {case.gpu_memory / _GB:.3g} GB (peak {plan.use.peak / _GB:.1f} GB, in "
        f"{fullest.name}); {plan.seconds:.2f} s a step{length}",
        f"host memory of a node: {ranks * host_while_loading(case) / _GB:.1f} GB while loading, "
        f"{ranks * host_while_saving(case) / _GB:.1f} GB while a checkpoint is written",
    ]
    if not plan.is_fitting:
        lines.append(_advice(plan))
    return "\n".join(lines)


def _advice(plan: Plan) -> str:
    if plan.nearest is None:
        return (
            "nothing that was tried fits: checkpointing, micro-batch, cache, tensor-parallel size, ZeRO stage, up to 8 "
            "times the nodes; use shorter prompts and responses, smaller models, or larger GPUs"
        )
    found = plan.nearest
    return (
        f"nearest that fits: {setting_words(changes(plan.case, found.case))} "
        f"({needed_bytes(found.case, found.use) / _GB:.1f} GB, {found.seconds:.2f} s a step)"
    )


def setting_words(settings: Mapping[str, Any]) -> str:
    """Settings as they are typed: ``--nodes 2 train.micro_batch_size=4``."""
    return " ".join(
        f"{key} {value}" if key.startswith("--") else f"{key}={_typed(value)}" for key, value in settings.items()
    )


def _typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _layouts(layouts: Sequence[Candidate]) -> str:
    if not layouts:
        return "no layout fits"
    zero = [ZERO, HPZ] if any(found.case.hpz_size > 1 for found in layouts) else [ZERO]
    micro = BUDGET if BUDGET in layouts[0].settings() else MICRO
    header = (TP, "dp", *zero, micro, CHECKPOINTING, "needed GB", "s a step")
    rows = [
        [
            *(_typed(value) for value in (found.case.tp_size, found.case.dp_size)),
            *(_typed(value) for value in (found.case.zero_stage, found.case.hpz_size)[: len(zero)]),
            *(_typed(found.settings()[key]) for key in (micro, CHECKPOINTING)),
            f"{needed_bytes(found.case, found.use) / _GB:.1f}",
            f"{found.seconds:.2f}",
        ]
        for found in layouts[:_SHOWN_LAYOUTS]
    ]
    more = f"\n... and {len(layouts) - len(rows)} slower ones that fit" if len(layouts) > len(rows) else ""
    return text_table(header, rows) + more


def _bullets(lines: Sequence[str]) -> str:
    wrapped = [textwrap.fill(line, _WIDTH, initial_indent="- ", subsequent_indent="  ") for line in lines]
    return "\n".join(["assumed:", *wrapped])


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan for JSON; memory in bytes, times in seconds."""
    case = plan.case
    return {
        "layout": {
            "nodes": case.nodes,
            "gpus_per_node": case.gpus_per_node,
            "gpu_memory": case.gpu_memory,
            "gpu": asdict(plan.gpu),
            "tp_size": case.tp_size,
            "dp_size": case.dp_size,
            "zero_stage": case.zero_stage,
            "hpz_partition_size": case.hpz_size,
            "micro_batch_size": case.config.train.micro_batch_size,
            "micro_batch_tokens": case.config.train.micro_batch_tokens,
            "global_batch_size": case.config.train.global_batch_size,
            "gradient_checkpointing": case.config.model.gradient_checkpointing,
            "prompt_tokens": case.prompt_tokens,
            "response_tokens": case.response_tokens,
        },
        "fits": plan.is_fitting,
        "needed": needed_bytes(case, plan.use),
        "seconds": plan.seconds,
        "use": plan.use.as_dict(),
        "times": {name: {**asdict(time), "seconds": time.seconds} for name, time in plan.times.items()},
        "process": 0 if case.like_gpu else PROCESS_BYTES,
        "host": {"loading": host_while_loading(case), "saving": host_while_saving(case)},
        "nearest": None if plan.nearest is None else _candidate(plan, plan.nearest),
        "layouts": None if plan.layouts is None else [_candidate(plan, found) for found in plan.layouts],
        "comparison": None if plan.comparison is None else [asdict(row) for row in plan.comparison.rows],
        "assumptions": plan.assumptions(),
    }


def _candidate(plan: Plan, found: Candidate) -> dict[str, Any]:
    return {
        "settings": found.settings(),
        "changes": changes(plan.case, found.case),
        "peak": found.use.peak,
        "needed": needed_bytes(found.case, found.use),
        "seconds": found.seconds,
    }


def bars(plan: Plan) -> dict[str, dict[str, float]]:
    """Bar -> owner -> GB, for a picture."""
    return {name: {owner: size / _GB for owner, size in table.items()} for name, table in plan.memory().items()}
