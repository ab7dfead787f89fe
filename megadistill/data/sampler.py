"""The rows of a step's global batch: a pure function of the step, so that resuming needs only the step's number."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from megadistill.errors import ConfigError, TopologyError

Stream = Literal["train", "prompts"]
_STREAM_KEYS: dict[Stream, int] = {"train": 0, "prompts": 1}
_BATCH, _RATIO = "train.global_batch_size", "data.prompts_ratio"


class SampledRow(NamedTuple):
    """A row of a batch. ``sequence_id`` is unique in the run and keys all random numbers that belong to this row."""

    sequence_id: int
    stream: Stream
    row_index: int


@dataclass(frozen=True)
class BatchSampler:
    """Global batches: round(global_batch_size * (1 - prompts_ratio)) rows of ``train``, then the rest of ``prompts``.

    Each stream goes through its rows in a new permutation per epoch, keyed by (seed, stream, epoch); a batch may span
    two epochs. Row i of the global batch goes to data-parallel rank i % dp_size: every rank has its share of both
    streams, and the union over ranks does not depend on dp_size.

    Attributes:
        num_rows: Rows of ``train``.
        num_prompt_rows: Rows of ``prompts``.
        prompts_ratio: Share of ``prompts`` in a global batch, 0 to 1.
        global_batch_size: Rows of a step, over all ranks.
        seed: Seed of the permutations.
        dp_rank: This data-parallel rank.
        dp_size: Number of data-parallel ranks.

    Raises:
        ConfigError: A stream that a batch needs has no rows, or a size or ratio is out of range.
        TopologyError: dp_size does not divide global_batch_size.
    """

    num_rows: int
    num_prompt_rows: int
    prompts_ratio: float
    global_batch_size: int
    seed: int
    dp_rank: int = 0
    dp_size: int = 1

    def __post_init__(self) -> None:
        if self.global_batch_size < 1:
            raise ConfigError(f"a global batch of {self.global_batch_size} rows; at least 1 is needed", setting=_BATCH)
        if not 0.0 <= self.prompts_ratio <= 1.0:
            raise ConfigError(f"a ratio of prompts of {self.prompts_ratio} is not between 0 and 1", setting=_RATIO)
        if not 0 <= self.dp_rank < self.dp_size or self.global_batch_size % self.dp_size:
            raise TopologyError(
                f"a global batch of {self.global_batch_size} rows is not a multiple of the data-parallel size "
                f"{self.dp_size}",
                setting=_BATCH,
            )
        shares = {"training": (1.0 - self.prompts_ratio, self.num_train_per_step),
                  "prompt": (self.prompts_ratio, self.num_prompts_per_step)}  # fmt: skip
        for kind, (share, count) in shares.items():
            if share > 0 and count == 0:
                raise ConfigError(
                    f"a ratio of prompts of {self.prompts_ratio} leaves no {kind} row in a batch of "
                    f"{self.global_batch_size}; use larger batches or another ratio",
                    setting=f"{_RATIO}, {_BATCH}",
                )
        if self.num_train_per_step and self.num_rows < 1:
            raise ConfigError(
                f"each step takes {self.num_train_per_step} training row(s), but there are none",
                setting="data.train_path",
            )
        if self.num_prompts_per_step and self.num_prompt_rows < 1:
            raise ConfigError(
                f"each step takes {self.num_prompts_per_step} prompt row(s), but there are none",
                setting=f"data.prompts_path, {_RATIO}",
            )

    @property
    def num_train_per_step(self) -> int:
        """Rows of a batch that come from ``train``."""
        return round(self.global_batch_size * (1.0 - self.prompts_ratio))

    @property
    def num_prompts_per_step(self) -> int:
        """Rows of a batch that come from ``prompts``."""
        return self.global_batch_size - self.num_train_per_step

    def global_rows(self, step: int) -> list[SampledRow]:
        """The whole global batch of ``step`` (counted from 0), in the order of sequence ids."""
        first = step * self.global_batch_size
        drawn: list[tuple[Stream, int]] = [
            *(("train", row) for row in self._draw("train", self.num_rows, self.num_train_per_step, step)),
            *(("prompts", row) for row in self._draw("prompts", self.num_prompt_rows, self.num_prompts_per_step, step)),
        ]
        return [SampledRow(first + i, stream, row) for i, (stream, row) in enumerate(drawn)]

    def rows(self, step: int) -> list[SampledRow]:
        """This data-parallel rank's rows of ``step``."""
        return self.global_rows(step)[self.dp_rank :: self.dp_size]

    def _draw(self, stream: Stream, size: int, count: int, step: int) -> list[int]:
        positions = range(step * count, (step + 1) * count)
        return [int(_permutation(self.seed, _STREAM_KEYS[stream], at // size, size)[at % size]) for at in positions]


@lru_cache(maxsize=8)
def _permutation(seed: int, stream_key: int, epoch: int, size: int) -> np.ndarray:
    """A pure function; the cache saves drawing an epoch's order again at every step."""
    key = np.random.SeedSequence([seed, stream_key, epoch])
    return np.random.Generator(np.random.Philox(key)).permutation(size)
