"""What a training run is made of, built once and passed to every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from megadistill.config.schema import RunConfig
from megadistill.data.spans import SpanPrior
from megadistill.engines.student import Student
from megadistill.engines.teacher import PartitionedModel
from megadistill.generation.protocols import Rows
from megadistill.generation.scoring import response_hidden
from megadistill.losses import LossConfig
from megadistill.parallel.context import ParallelContext
from megadistill.training.gate import GateTrainer


@dataclass(frozen=True)
class Parts:
    """Everything a step needs. ``teacher`` and ``gate`` are None where the configuration has no use for them."""

    config: RunConfig
    context: ParallelContext
    tokenizer: Any
    eos_ids: frozenset[int]
    pad_id: int
    span_prior: SpanPrior
    loss: LossConfig
    student: Student
    teacher: PartitionedModel | None
    gate: GateTrainer | None

    def response_limit(self, prompt_length: int) -> int:
        """Most tokens that a response to a prompt of this length may have."""
        return min(self.config.generation.max_new_tokens, self.config.data.max_tokens - prompt_length)

    def response_hidden(self, hidden: Callable[..., torch.Tensor], rows: Rows) -> list[torch.Tensor]:
        """``generation.scoring.response_hidden`` with this run's padding and batch width."""
        return response_hidden(
            hidden,
            rows,
            pad_id=self.pad_id,
            device=self.context.device,
            rows_per_pass=self.config.train.micro_batch_size,
        )

    @contextmanager
    def teacher_head(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None] | None]:
        """The teacher's head shard, gathered for the duration; None without a teacher."""
        if self.teacher is None:
            yield None
            return
        with self.teacher.head() as head:
            yield head

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a response, special tokens left out."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
