"""A torch profiler trace of some steps (``train.profile_steps``)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megadistill.observability.log import get_logger
from megadistill.parallel.context import ParallelContext
from megadistill.training.hooks.base import Hook, StepEvent


class Profile(Hook):
    """Traces some steps on every rank; chrome://tracing and Perfetto read the files.

    Args:
        run_dir: The folder of the run.
        context: The grid of processes.
        first: The first step that is traced, counted from 1.
        last: The last one.
    """

    def __init__(self, run_dir: Path, context: ParallelContext, first: int, last: int) -> None:
        self._context, self._first, self._last = context, first, last
        self._folder = run_dir / "profile"
        self._profile: profile | None = None

    def step_started(self, step: int) -> None:
        """Starts the trace."""
        if self._profile is None and self._first <= step <= self._last:
            activities = [ProfilerActivity.CPU]
            if self._context.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._first = step  # a resumed run may begin inside the range
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.start()

    def step_ended(self, event: StepEvent) -> None:
        """Writes the trace after the last of its steps."""
        if self._profile is not None and event.step >= self._last:
            self._write(event.step)

    def stopped(self, step: int, reason: str) -> None:
        """Writes what has been traced."""
        if self._profile is not None:
            self._write(step)

    def _write(self, step: int) -> None:
        assert self._profile is not None
        if self._context.device.type == "cuda":
            torch.cuda.synchronize()
        self._profile.stop()
        file = self._folder / f"steps_{self._first}-{step}_rank{self._context.rank}.json.gz"
        self._context.run_on_rank0(lambda: self._folder.mkdir(parents=True, exist_ok=True), self._folder)
        self._profile.export_chrome_trace(str(file))
        self._profile = None
        get_logger(self._context.rank, "train").info(f"torch trace of steps {self._first} to {step}: {file}")
