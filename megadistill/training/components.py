"""What a training run is made of, built once and passed to every step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megadistill.config.schema import RunConfig
from megadistill.data.spans import SpanPrior
from megadistill.data.tokenize import decode_response
from megadistill.decoding.batch_plan import DecodeBatchPlan
from megadistill.engines.partitioned import PartitionedModel
from megadistill.engines.student import Student
from megadistill.generation.sources.base import TextSource
from megadistill.losses import LossConfig
from megadistill.models.end_tokens import cut_end
from megadistill.parallel.context import ParallelContext
from megadistill.parallel.output_head import OutputHead
from megadistill.training.focus import TokenFocus
from megadistill.training.gate import GateTrainer
from megadistill.training.interpolation import Interpolation
from megadistill.training.length import RunLength

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Components:
    """Everything a step needs.

    Attributes:
        config: The configuration of the run.
        context: The grid of processes.
        tokenizer: The tokenizer of both models.
        pad_id: The padding token.
        eos_ids: Tokens that end a text of the student.
        teacher_eos_ids: Tokens that end a text of the teacher; none without one.
        span_prior: Finds phrases in responses.
        loss: Weights and options of the losses.
        student: The model that is trained.
        teacher: The teacher; None where no loss needs it.
        gate: The quantile gate and its optimizer; None where the losses do not use it.
        source: Where the text of a step comes from.
        decode_plan: How many examples are written at a time.
        model_folders: Key of each model -> where it was loaded from.
        hub_commits: Hub names of the run -> their commits.
        length: How many steps the run has.
        focus: Which tokens are trained on (``loss.adakd``); None: all.
        interpolation: What the teacher is mixed with, and how much (``loss.taid``); None: nothing.
    """

    config: RunConfig
    context: ParallelContext
    tokenizer: PreTrainedTokenizerBase
    pad_id: int
    eos_ids: frozenset[int]
    teacher_eos_ids: frozenset[int]
    span_prior: SpanPrior
    loss: LossConfig
    student: Student
    teacher: PartitionedModel | None
    gate: GateTrainer | None
    source: TextSource
    decode_plan: DecodeBatchPlan
    length: RunLength
    model_folders: dict[str, str]
    hub_commits: dict[str, str] = field(default_factory=dict)
    interpolation: Interpolation | None = None
    focus: TokenFocus | None = None

    @property
    def schedules(self) -> list[Interpolation | TokenFocus]:
        """What changes with the token loss, step by step."""
        return [schedule for schedule in (self.interpolation, self.focus) if schedule is not None]

    @contextmanager
    def heads(self) -> Iterator[OutputHead | None]:
        """Both models' heads, each gathered once over the data-parallel group, for as long as the context lasts.

        Yields:
            The teacher's head; None without a teacher.
        """
        with self.student.head():
            if self.teacher is None:
                yield None
                return
            with self.teacher.head() as head:
                yield head

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a response, without the token that ended it and without special tokens."""
        return decode_response(self.tokenizer, cut_end(token_ids, self.eos_ids | self.teacher_eos_ids))
