"""Mode ``mixed``: student text at some steps, references at the others; or at some rows of every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megadistill.config.schema import RunConfig
from megadistill.data.encode import TokenizedExample
from megadistill.data.sample import Sample
from megadistill.generation.sources.base import CacheNeeds, SourceInputs, TextSource
from megadistill.generation.sources.by_row import ByRow, MixedRows
from megadistill.generation.sources.dataset import Dataset
from megadistill.generation.sources.on_policy import OnPolicy
from megadistill.observability.timers import Timers
from megadistill.parallel.rng import Stream, uniform


def step_draw(seed: int, step: int) -> float:
    """The random number in (0, 1) that decides where a step's text comes from, the same on every rank."""
    return float(uniform(seed, torch.tensor([step]), torch.tensor([0]), stream=Stream.TEXT_SOURCE))


class Mixed(TextSource):
    """One source with probability ``ratio`` at each step, another one otherwise.

    Args:
        first: Student text.
        second: References, and student text for rows that have none.
        ratio: The probability.
        seed: Keys the choice, with the step.
        by_row: ``second`` chooses for each row, with that probability.
    """

    def __init__(self, first: TextSource, second: TextSource, ratio: float, seed: int, by_row: bool = False) -> None:
        self._first, self._second, self._ratio, self._seed, self._by_row = first, second, ratio, seed, by_row

    @classmethod
    def cache_needs(cls) -> CacheNeeds:
        """Those of the student text."""
        return OnPolicy.cache_needs()

    @classmethod
    def check_examples(
        cls, config: RunConfig, train: Sequence[TokenizedExample], valid: Sequence[TokenizedExample]
    ) -> None:
        """Checks that there is a reference, unless all text is the student's.

        Raises:
            DataError: There is none.
        """
        if config.generation.student_ratio < 1:
            Dataset.check_examples(config, train, valid)

    @classmethod
    def build(cls, inputs: SourceInputs) -> Mixed:
        """Student text with probability ``generation.student_ratio``, references otherwise."""
        ratio, seed = inputs.config.generation.student_ratio, inputs.config.run.seed
        by_row = inputs.config.generation.mixed_by == "row"
        student = OnPolicy.build(inputs)
        parts = student, Dataset.build(inputs), inputs.context
        second = MixedRows(*parts, ratio, seed) if by_row else ByRow(*parts)
        return cls(student, second, ratio, seed, by_row)

    @property
    def student_share(self) -> float:
        """The ratio."""
        return self._ratio

    def choose(self, step: int) -> TextSource:
        """One of the two sources, the same one on every rank."""
        if self._by_row:
            return self._second
        source = self._first if step_draw(self._seed, step) < self._ratio else self._second
        return source.choose(step)

    def samples(self, step: int, batch: Sequence[Sample], timers: Timers) -> list[Sample]:
        """The samples of the chosen source."""
        return self.choose(step).samples(step, batch, timers)

    def updated(self, step: int, samples: Sequence[Sample]) -> None:
        """Tells the chosen source."""
        self.choose(step).updated(step, samples)

    def observe(self, validation: Mapping[str, float]) -> None:
        """Tells both sources."""
        self._first.observe(validation)
        self._second.observe(validation)


SOURCE = Mixed
