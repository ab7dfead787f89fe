"""How long a run is: steps from ``train.max_steps``, or from ``train.epochs`` and the number of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from megadistill.config.schema import RunConfig
from megadistill.training.data import TrainingData, make_sampler


@dataclass(frozen=True)
class RunLength:
    """The length of a run. Everything that depends on the last step asks here.

    Attributes:
        max_steps: Optimizer updates of the whole run.
        num_rows: Rows of ``data.train_path`` that are left to train on.
        rows_per_step: How many of them a step takes; rows of ``data.prompts_path`` are not among them.
    """

    max_steps: int
    num_rows: int
    rows_per_step: int

    @classmethod
    def of(cls, config: RunConfig, data: TrainingData) -> RunLength:
        """The length of a run on these rows, the same on every rank.

        Raises:
            ConfigError: As ``make_sampler``.
        """
        num_rows, rows_per_step = len(data.train), make_sampler(config, data).num_train_per_step
        train = config.train
        if train.epochs is None:
            assert train.max_steps is not None, "the schema sets one of them"
            return cls(train.max_steps, num_rows, rows_per_step)
        # The decimal number as it was typed: 0.1 epochs of 30 rows are 3 rows, not a little more.
        steps = math.ceil(Fraction(repr(train.epochs)) * num_rows / rows_per_step)
        return cls(max(1, steps), num_rows, rows_per_step)

    @property
    def steps_per_epoch(self) -> float:
        """Steps of one pass over the rows; not always a whole number, because a batch may span two epochs."""
        return self.num_rows / self.rows_per_step

    def epochs(self, steps: int) -> float:
        """Passes over the rows that ``steps`` steps make."""
        return steps * self.rows_per_step / self.num_rows
