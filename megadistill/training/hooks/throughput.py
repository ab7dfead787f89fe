"""How fast a run is: time and memory of a step, tokens and examples per second by phase, model FLOP utilization."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from megadistill.engines.partitioned import PartitionedModel
from megadistill.engines.student import Student
from megadistill.models.lora import trained_names
from megadistill.observability.memory import peak_bytes, reset_peak
from megadistill.training.components import Components
from megadistill.training.hooks.base import Hook, StepEvent

# Dense bf16 peak of one device in FLOP/s, by a part of its name; the vendors' data sheets.
_PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A40": 150e12,
}


@dataclass(frozen=True)
class StepTokens:
    """Global numbers of tokens of one step.

    Attributes:
        read: Prompts and responses that the teacher read, each counted once.
        trained: Trained on by the student.
        written: Written by the student before any correction.
    """

    read: float
    trained: float
    written: float


class Throughput(Hook):
    """Adds ``time/step_s``, ``memory/peak_bytes`` and ``throughput/...`` to the metrics of a step.

    Times are rank 0's own; tokens are those of all ranks. FLOPs are 2 for each parameter and token of a forward pass
    and 6 for forward and backward (4 where it is frozen), attention left out; ``throughput/mfu`` is there where the
    device's peak is known.
    """

    def __init__(self, components: Components) -> None:
        self._components = components
        self._began = 0.0
        self._num_student = num_parameters(components.student)
        self._num_trained = num_trained(components.student)
        self._num_teacher = num_parameters(components.teacher)
        self._peak = peak_flops(components.context.device)
        self._tokens = self._examples = self._seconds = self._flops = self._peak_memory = 0.0

    def step_started(self, step: int) -> None:
        """Starts the clock."""
        reset_peak(self._components.context.device)
        self._began = time.perf_counter()

    def step_ended(self, event: StepEvent) -> None:
        """Adds time, memory and throughput to the metrics."""
        context, metrics = self._components.context, event.metrics
        seconds = time.perf_counter() - self._began
        metrics["time/step_s"] = seconds
        metrics["memory/peak_bytes"] = float(peak_bytes(context.device))
        tokens, num_examples = self._count(event), self._components.config.train.global_batch_size
        # Forward pass and gradients of activations 2 each a number and token, of weights 2 for those that are trained.
        trained_flops = 4 * self._num_student + 2 * self._num_trained
        flops = trained_flops * tokens.trained + 2 * self._num_student * tokens.written
        flops += 2 * self._num_teacher * tokens.read
        metrics["throughput/tokens_per_s"] = tokens.trained / seconds
        metrics["throughput/examples_per_s"] = num_examples / seconds
        for phase, count in (("rollout", tokens.written), ("teacher", tokens.read), ("train", tokens.trained)):
            phase_s = metrics.get(f"time/{phase}_s", 0.0)
            if count and phase_s > 0:
                metrics[f"throughput/{phase}_tokens_per_s"] = count / phase_s
                metrics[f"throughput/{phase}_examples_per_s"] = num_examples / phase_s
        if self._peak is not None:
            metrics["throughput/mfu"] = flops / (seconds * self._peak * context.world_size)
        self._tokens, self._examples = self._tokens + tokens.trained, self._examples + num_examples
        self._seconds, self._flops = self._seconds + seconds, self._flops + flops
        self._peak_memory = max(self._peak_memory, metrics["memory/peak_bytes"])

    def summary(self) -> dict[str, Any]:
        """Mean over the steps of this process; validation and checkpoints are not counted."""
        if not self._seconds:
            return {}
        throughput = {"tokens_per_s": self._tokens / self._seconds, "examples_per_s": self._examples / self._seconds}
        if self._peak is not None:
            throughput["mfu"] = self._flops / (self._seconds * self._peak * self._components.context.world_size)
        return {"throughput": throughput, "memory_peak_bytes": self._peak_memory}

    def _count(self, event: StepEvent) -> StepTokens:
        """One all-reduce of three numbers over the data-parallel group."""
        samples, context = event.result.samples, self._components.context
        read = sum(len(s.prompt_ids) + len(s.response_ids) for s in samples if s.response_ids is not None)
        trained = sum(
            len(s.prompt_ids) + len(ids)
            for s in samples
            for ids in ([s.reference_ids] if s.response_ids is s.reference_ids else [s.reference_ids, s.response_ids])
            if ids is not None
        )
        written = sum(len(s.rollout_ids) for s in samples if s.rollout_ids is not None)
        local = torch.tensor([read, trained, written], dtype=torch.float64, device=context.device)
        total = StepTokens(*context.sum_over_dp(local).tolist())
        return total if self._num_teacher else StepTokens(0.0, total.trained, total.written)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a device in FLOP/s; None where it is not known."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    for name, peak in _PEAK_FLOPS.items():
        if set(name.split()) <= set(words):
            return peak
    return None


def num_parameters(model: PartitionedModel | None) -> int:
    """Parameters of the whole model; a tied head counts once. 0 for no model."""
    return 0 if model is None else sum(math.prod(shape) for shape in model.loaded.shapes.values())


def num_trained(student: Student) -> int:
    """Parameters of the whole student that are trained."""
    loaded = student.loaded
    return sum(math.prod(loaded.shapes[name]) for name in trained_names(loaded))
