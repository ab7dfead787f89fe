"""What a run writes down as it goes: metrics.jsonl, TensorBoard and samples.jsonl, by rank 0 alone."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from megadistill.errors import CheckpointError
from megadistill.observability.metrics import JsonLines, MetricsWriter
from megadistill.parallel.context import ParallelContext


class Record:
    """The files of a run from ``first_step`` on. ``error``: why rank 0 could not write, None on all other ranks: a
    rank that left alone would keep the others waiting, so they are told first
    (`ParallelContext.raise_on_all_ranks`)."""

    def __init__(self, run_dir: Path, context: ParallelContext, first_step: int) -> None:
        self.error: CheckpointError | None = None
        self._run_dir = run_dir
        self._metrics: MetricsWriter | None = None
        self._samples: JsonLines | None = None
        context.run_on_rank0(lambda: self._open(first_step), run_dir)

    def _open(self, first_step: int) -> None:
        self._metrics = MetricsWriter(self._run_dir, last_step=first_step)
        self._samples = JsonLines(self._run_dir / "samples.jsonl", last_step=first_step)

    def write(self, step: int, metrics: dict[str, float], samples_by_rank: list[list[dict[str, Any]]]) -> None:
        """One line of metrics, and one for each sample, in the order of the global batch."""
        if self._metrics is None or self._samples is None:
            return
        samples = [sample for samples in samples_by_rank for sample in samples]
        try:
            self._metrics.write(step, metrics)
            for sample in sorted(samples, key=lambda sample: sample["sequence_id"]):
                self._samples.append(sample)
        except OSError as error:
            self.error = CheckpointError(
                f"step {step} cannot be written down in {self._run_dir}: {error.strerror or error}"
            )

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._metrics, self._samples):
            if file is not None:
                with suppress(OSError):  # every line was flushed when it was written
                    file.close()
