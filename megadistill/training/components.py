"""What a training run is made of, built once and passed to every step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from megadistill.config.schema import RunConfig
from megadistill.data.spans import SpanPrior
from megadistill.data.tokenize import TokenizedExample
from megadistill.decoding.batch_plan import DecodeBatchPlan
from megadistill.decoding.protocols import Prefiller
from megadistill.engines.student import Student
from megadistill.engines.teacher import PartitionedModel
from megadistill.generation.policy import TextPolicy
from megadistill.losses import LossConfig
from megadistill.parallel.context import ParallelContext
from megadistill.training.gate import GateTrainer

TeacherTexts = Mapping[tuple[int, ...], tuple[int, ...]]  # prompt -> response


@dataclass(frozen=True)
class Components:
    """Everything a step needs. Optional components are None where the configuration has no use for them."""

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
    policy: TextPolicy
    decode_plan: DecodeBatchPlan
    teacher_texts: TeacherTexts | None = None

    def response_limit(self, prompt_length: int) -> int:
        """Most tokens that a response to a prompt of this length may have."""
        return min(self.config.generation.max_new_tokens, self.config.data.max_tokens - prompt_length)

    def prefiller(self) -> Prefiller:
        """The teacher as a reader of text."""
        assert self.teacher is not None
        return self.teacher.prefiller(self.config.train.micro_batch_size)

    def teacher_text(self, example: TokenizedExample) -> tuple[int, ...]:
        """The teacher's own response to a prompt, for mode teacher."""
        assert self.teacher_texts is not None
        return self.teacher_texts[example.prompt_ids]

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
