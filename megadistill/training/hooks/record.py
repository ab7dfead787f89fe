"""What a run writes down: metrics.jsonl, TensorBoard and samples.jsonl, by rank 0 alone."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from megadistill.errors import CheckpointError
from megadistill.files import reason_of
from megadistill.observability.metrics import JsonLines, MetricsWriter
from megadistill.training.components import Components
from megadistill.training.hooks.base import Hook, StepEvent


class Record(Hook):
    """The files of a run.

    Args:
        run_dir: The folder of the run.
        components: What the run is made of.

    Attributes:
        error: Why rank 0 could not write; None on all other ranks. A rank that left alone would keep the others
            waiting, so they are told first (``ParallelContext.raise_on_all_ranks``).
    """

    def __init__(self, run_dir: Path, components: Components) -> None:
        self.error: CheckpointError | None = None
        self._run_dir, self._components = run_dir, components
        self._metrics: MetricsWriter | None = None
        self._samples: JsonLines | None = None

    def run_started(self, first_step: int) -> None:
        """Opens the files, which keep what was written up to ``first_step``."""
        self._components.context.run_on_rank0(lambda: self._open(first_step), self._run_dir)

    def _open(self, first_step: int) -> None:
        self._metrics = MetricsWriter(self._run_dir, last_step=first_step)
        self._samples = JsonLines(self._run_dir / "samples.jsonl", last_step=first_step)

    def step_ended(self, event: StepEvent) -> None:
        """Writes one line of metrics, and one for each sample, in the order of the global batch.

        One object all-gather over the data-parallel group at the steps that samples are written for.
        """
        every, context = self._components.config.train.samples_every, self._components.context
        samples: list[dict[str, Any]] = []
        if every and (event.step - 1) % every == 0:
            samples = [sample for part in context.gather_objects_over_dp(self._describe(event)) for sample in part]
        if self._metrics is None or self._samples is None:
            return
        try:
            self._metrics.write(event.step, event.metrics)
            for sample in sorted(samples, key=lambda sample: sample["sequence_id"]):
                self._samples.append(sample)
        except OSError as error:
            self.error = CheckpointError(f"step {event.step} cannot be recorded in {self._run_dir}: {reason_of(error)}")

    def close(self) -> None:
        """Closes the files."""
        for file in (self._metrics, self._samples):
            if file is not None:
                with suppress(OSError):  # every line was flushed when it was written
                    file.close()

    def _describe(self, event: StepEvent) -> list[dict[str, Any]]:
        """This rank's part of the first rows of the global batch as text, where the student wrote in this step.

        Nothing in it depends on the layout.
        """
        train, decode = self._components.config.train, self._components.decode
        first_id = (event.step - 1) * train.global_batch_size
        return [
            {
                "step": event.step,
                "sequence_id": sample.sequence_id,
                "prompt": sample.prompt,
                "student": decode(sample.rollout_ids),
                "error_position": sample.error_position,
                "corrected": decode(sample.response_ids or ()),
            }
            for sample in event.result.samples
            if sample.rollout_ids is not None and sample.sequence_id - first_id < train.samples_rows
        ]
