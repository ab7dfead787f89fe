"""What generation needs of a model. SCRG and decoding see nothing else, so both are tested with a fake one.

Shapes: B rows, P prompt columns (left-padded), N response columns, Vs this rank's slice of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from megadistill.parallel.vocab import VocabShard


class StepModel(Protocol):
    """A causal decoder, one column at a time."""

    shard: VocabShard
    device: torch.device

    def prefill(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """Reads left-padded prompts [B, P]; returns a state and the local logits [B, Vs] of the next token."""
        ...

    def decode(self, state: Any, tokens: torch.Tensor) -> torch.Tensor:
        """Appends tokens [B] to the state; returns the local logits [B, Vs] of the next token."""
        ...

    def select(self, state: Any, rows: torch.Tensor) -> None:
        """Keeps only the given rows (indices) of the state."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature 0 is greedy, top_k 0 and top_p 1 keep every class. ``seed`` keys the random
    numbers."""

    seed: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class Rows:
    """Prompts of this data-parallel rank with their responses (token ids, EOS included where there is one).

    ``sequence_ids`` are global and never repeat within a run: they key every random number of a row, whatever the
    layout.
    """

    sequence_ids: tuple[int, ...]
    prompts: tuple[tuple[int, ...], ...]
    responses: tuple[tuple[int, ...], ...]

    def with_responses(self, responses: Sequence[Sequence[int]]) -> Rows:
        """The same prompts with other responses."""
        return Rows(self.sequence_ids, self.prompts, tuple(tuple(r) for r in responses))


class Scores(NamedTuple):
    """The teacher's reading of responses, right-padded to N columns.

    ``kl_map`` [B, N] float, nats: KL(teacher || student) at every response position. ``teacher_tokens`` [B, N] int64:
    the teacher's own token there. ``mask`` [B, N] bool: positions that exist.
    """

    kl_map: torch.Tensor
    teacher_tokens: torch.Tensor
    mask: torch.Tensor


class Scorer(Protocol):
    """Reads prompt + response once with teacher and student. ``round_index`` keys sampled teacher tokens."""

    def __call__(self, rows: Rows, round_index: int) -> Scores: ...
