"""What a run reports to experiment trackers, by rank 0 alone."""

from __future__ import annotations

from pathlib import Path

from megadistill.config.load import flatten
from megadistill.observability.trackers import TrackedRun, Trackers
from megadistill.training.components import Components
from megadistill.training.hooks.base import Hook, StepEvent


class Track(Hook):
    """Reports each step's metrics to the trackers of ``run.trackers``.

    Args:
        run_dir: The folder of the run.
        components: What the run is made of.
    """

    def __init__(self, run_dir: Path, components: Components) -> None:
        self._run_dir, self._components = run_dir, components
        self._trackers: Trackers | None = None
        self._is_done = False

    def run_started(self, first_step: int) -> None:
        """Begins the trackers' runs, or goes on with them where steps are done already."""
        self._components.context.run_on_rank0(lambda: self._open(first_step), self._run_dir)

    def _open(self, first_step: int) -> None:
        config = self._components.config
        run = TrackedRun(self._run_dir, config.run.project, flatten(config.model_dump(mode="json")))
        self._trackers = Trackers(config.run.trackers, run, is_resumed=first_step > 0)

    def step_ended(self, event: StepEvent) -> None:
        """Reports the step's metrics."""
        if self._trackers is not None:
            self._trackers.log(event.step, event.metrics)

    def finished(self, step: int) -> None:
        """Takes note that the last step was made."""
        self._is_done = True

    def close(self) -> None:
        """Ends the trackers' runs: as finished after the last step, else as stopped."""
        if self._trackers is not None:
            self._trackers.close(self._is_done)
