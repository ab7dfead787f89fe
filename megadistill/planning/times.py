"""Seconds of a step from what it uses and from rates, each of which is an assumption until it has been measured."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megadistill.config.load import load_config
from megadistill.errors import DataError
from megadistill.files import read_json_lines
from megadistill.planning.case import Case, Models
from megadistill.planning.formulas import step_use
from megadistill.planning.gpus import COLLECTIVE_S, LAUNCH_S, LINK_SHARE, MFU, NETWORK_SHARE, RECORDED_LAUNCH_S, Gpu
from megadistill.planning.use import GROUPS, Group, PhaseUse, StepUse, Traffic
from megadistill.planning.work import Work, work

_WARM_UP_STEPS = 2


@dataclass(frozen=True)
class PhaseTime:
    """Seconds of a phase by what they are spent on.

    Attributes:
        products: At the assumed share of the peak.
        memory: At the bandwidth of the GPU's memory.
        launches: At the assumed time of a launch.
        tp: Collectives of the tensor-parallel group.
        dp: Collectives of the data-parallel group.
        hpz: Collectives of the data-parallel ranks that keep the weights once more.
        factor: What measured seconds were over predicted ones; 1 without a measurement.
    """

    products: float
    memory: float
    launches: float
    tp: float
    dp: float
    hpz: float = 0.0
    factor: float = 1.0

    @property
    def seconds(self) -> float:
        """The longest of products, memory and launches, and the collectives after one another."""
        return self.factor * (max(self.products, self.memory, self.launches) + self.tp + self.dp + self.hpz)

    @property
    def bound(self) -> str:
        """What the largest part of the time is spent on."""
        parts = {"products": self.products, "memory": self.memory, "launches": self.launches}
        longest = max(parts, key=lambda name: parts[name])
        sent = {"tp": self.tp, "dp": self.dp, "hpz": self.hpz}
        return max({longest: parts[longest], **sent}.items(), key=lambda item: item[1])[0]


def phase_times(case: Case, use: StepUse, gpu: Gpu, factors: Mapping[str, float] | None = None) -> dict[str, PhaseTime]:
    """Phase -> its seconds.

    Args:
        case: The run and the machines.
        use: What a rank uses.
        gpu: The GPU.
        factors: Phase -> measured over predicted seconds.
    """
    done, measured = work(case), factors or {}
    return {
        phase.name: _phase_time(case, phase, gpu, done.get(phase.name, Work()), measured.get(phase.name, 1.0))
        for phase in use.phases
    }


def step_seconds(times: Mapping[str, PhaseTime]) -> float:
    """Seconds of a step, whose phases follow one another."""
    return sum(time.seconds for time in times.values())


def _phase_time(case: Case, phase: PhaseUse, gpu: Gpu, done: Work, factor: float) -> PhaseTime:
    itemsize = case.teacher_bytes if phase.name == "teacher" else case.student_bytes
    peak = gpu.bf16 if itemsize == 2 else gpu.fp32
    sent = {group: sum(_seconds(case, t, gpu) for t in phase.traffic if t.group == group) for group in GROUPS}
    return PhaseTime(
        phase.flops / (peak * MFU),
        done.memory_bytes / gpu.bandwidth,
        phase.operations * LAUNCH_S + done.recorded * RECORDED_LAUNCH_S,
        sent["tp"],
        sent["dp"],
        sent["hpz"],
        factor,
    )


def crosses_nodes(case: Case, group: Group) -> bool:
    """Whether a group has ranks on several machines. Tensor-parallel ranks are neighbors."""
    if group == "tp":
        return case.gpus_per_node % case.tp_size != 0
    if group == "hpz":
        return case.gpus_per_node % (case.tp_size * case.hpz_size) != 0
    return case.nodes > 1


def _seconds(case: Case, traffic: Traffic, gpu: Gpu) -> float:
    sizes: dict[Group, int] = {"tp": case.tp_size, "dp": case.dp_size, "hpz": case.hpz_size, "world": case.world_size}
    size = sizes[traffic.group]
    share = (size - 1) / size
    volume = traffic.bytes * (2 * share if traffic.op == "all_reduce" else share)
    speed = gpu.network * NETWORK_SHARE if crosses_nodes(case, traffic.group) else gpu.link * LINK_SHARE
    return traffic.calls * COLLECTIVE_S + volume / speed


def rate_assumptions(case: Case, gpu: Gpu) -> tuple[str, ...]:
    """The rates, for people."""
    fp32 = f", {gpu.fp32 / 1e12:g} in fp32" if 4 in (case.student_bytes, case.teacher_bytes) else ""
    launch = f"{LAUNCH_S * 1e6:g} us a launch"
    if case.records_steps:
        launch += f" ({RECORDED_LAUNCH_S * 1e6:g} in a recorded decoding step)"
    ranks = "GPUs" if case.like_gpu else "processes"
    return (
        f"[est] {gpu.name}: {MFU:.0%} of {gpu.bf16 / 1e12:g} TFLOP/s{fp32}; memory {gpu.bandwidth / 1e12:g} TB/s; "
        f"{launch}, {COLLECTIVE_S * 1e6:g} us a collective",
        f"[est] {LINK_SHARE:.0%} of {gpu.link / 1e9:g} GB/s between the {ranks} of a node, {NETWORK_SHARE:.0%} of "
        f"{gpu.network / 1e9:g} GB/s each between nodes; collectives do not overlap with computing",
    )


def measured_factors(metrics: Path, gpu: Gpu, gpus_per_node: int) -> dict[str, float]:
    """Phase -> what its seconds were in a run over what is predicted for that run.

    The run's folder tells its settings (resolved.yaml) and processes (summary.json). The first steps, in which kernels
    are chosen and compiled, do not count.

    Args:
        metrics: metrics.jsonl of a run.
        gpu: The GPU that it ran on.
        gpus_per_node: GPUs of a machine.

    Raises:
        DataError: A file is missing or damaged, or there are too few steps.
        ConfigError: The run's models cannot be read.
    """
    if metrics.is_dir():
        raise DataError(f"--rates {metrics} is a folder; give the metrics.jsonl in it, of a finished run")
    folder = metrics.parent
    for file in (metrics, folder / "resolved.yaml", folder / "summary.json"):
        if not file.is_file():
            raise DataError(f"--rates {metrics}: {file} is missing; the metrics.jsonl of a finished run is needed")
    try:
        records = read_json_lines(metrics)
        processes = int(json.loads((folder / "summary.json").read_text(encoding="utf-8"))["processes"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"--rates {metrics}: metrics.jsonl or summary.json beside it is damaged: {error}") from None
    counted = records[_WARM_UP_STEPS:]
    if not counted:
        raise DataError(f"--rates {metrics}: has {len(records)} steps; at least {_WARM_UP_STEPS + 1} are needed")
    config = load_config(folder / "resolved.yaml")
    nodes = -(-processes // gpus_per_node)
    case = Case.of(config, Models.of(config), nodes=nodes, gpus_per_node=processes // nodes, gpu_memory=gpu.memory)
    predicted = phase_times(case, step_use(case), gpu)
    factors = {}
    for name, time in predicted.items():
        seconds = [record[f"time/{name}_s"] for record in counted if record.get(f"time/{name}_s")]
        if seconds and time.seconds > 0:
            factors[name] = statistics.median(seconds) / time.seconds
    if not factors:
        raise DataError(f"--rates {metrics}: no step has the time of a phase (time/train_s ...)")
    return factors
