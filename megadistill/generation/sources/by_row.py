"""Student text for some rows of a batch, references for the others. Not a mode: ``mixed`` and ``off_policy`` use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megadistill.data.sample import Sample
from megadistill.generation.sources.base import SourceInputs, TextSource
from megadistill.generation.sources.dataset import Dataset
from megadistill.generation.sources.on_policy import OnPolicy
from megadistill.observability.timers import Timers
from megadistill.parallel.context import ParallelContext
from megadistill.parallel.rng import Stream, uniform


class ByRow(TextSource):
    """Rows without a reference take student text, and of the others a random share does.

    Args:
        student: Writes text.
        dataset: References.
        context: The grid of processes.
        ratio: Probability that a row with a reference takes student text.
        seed: Keys that choice, with the row's sequence id.
    """

    kind = Dataset.kind

    def __init__(
        self, student: TextSource, dataset: TextSource, context: ParallelContext, ratio: float = 0.0, seed: int = 0
    ) -> None:
        self._student, self._dataset, self._context = student, dataset, context
        self._ratio, self._seed = ratio, seed

    @classmethod
    def build(cls, inputs: SourceInputs) -> ByRow:
        """References, and student text where there is none."""
        return cls(OnPolicy.build(inputs), Dataset.build(inputs), inputs.context)

    @property
    def student_share(self) -> float:
        """Of the rows with a reference."""
        return self._ratio

    def samples(self, step: int, batch: Sequence[Sample], timers: Timers) -> list[Sample]:
        """Student text or the reference of each row.

        All ranks write as many rows as the one that needs most of them (one all-reduce of a number), because writing
        communicates: what a rank has too many of is thrown away.
        """
        is_student = self._draw(batch)
        order = sorted(range(len(batch)), key=lambda i: not is_student[i])
        number = int(self._context.max_over_world(torch.tensor(sum(is_student), device=self._context.device)))
        written: list[Sample] = []
        if number:
            written = self._student.samples(step, [batch[i] for i in order[:number]], timers)
        read = [
            replace(sample, reference_ids=None) if mine else sample
            for sample, mine in zip(batch, is_student, strict=True)
        ]
        samples = self._dataset.samples(step, read, timers)
        for i, sample in zip(order, written, strict=False):
            if is_student[i]:
                samples[i] = sample
        return samples

    def _draw(self, batch: Sequence[Sample]) -> list[bool]:
        ids = torch.tensor([sample.sequence_id for sample in batch], dtype=torch.int64)
        numbers = uniform(self._seed, ids, torch.zeros_like(ids), stream=Stream.TEXT_SOURCE_OF_ROW).tolist()
        return [
            sample.reference_ids is None or number < self._ratio for sample, number in zip(batch, numbers, strict=True)
        ]


class MixedRows(ByRow):
    """The same where student text is meant for rows with a reference, too."""

    kind = "mixed"
