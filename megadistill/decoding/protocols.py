"""What generation needs of a model. SCRG and decoding see nothing else, so both are tested with a fake one.

Shapes: B rows, k active rows, N response columns, H hidden size, Vs this rank's slice of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from megadistill.decoding.kv_cache import PrefillChunk
from megadistill.parallel.vocab import VocabShard


class State(Protocol):
    """What a model remembers of rows in slots 0 ... B - 1; only the first ones are decoded."""

    def swap(self, a: int, b: int) -> None:
        """Exchanges the rows of two slots."""
        ...

    def sort(self, order: Sequence[int]) -> None:
        """Slot i gets the row of slot ``order[i]``."""
        ...


class Decoder(Protocol):
    """A causal decoder over preallocated columns. Communicates over the tensor-parallel group only."""

    shard: VocabShard
    device: torch.device
    head: tuple[torch.Tensor, torch.Tensor | None]
    """This rank's weight [Vs, H] and bias [Vs] of the output head."""

    def new_state(self, offsets: Sequence[int], columns: int) -> Any:
        """Room for rows whose first columns are ``offsets``."""
        ...

    def prefill(self, state: Any, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Reads prompts that all end in the same column; hidden states [B, H] that predict the first tokens."""
        ...

    def decode(self, state: Any, tokens: torch.Tensor, column: int) -> torch.Tensor:
        """Reads tokens [k] into a column of the first k slots, whatever that column held; hidden states [k, H]."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's logits [k, Vs] of hidden states [k, H]."""
        ...


class Prefiller(Protocol):
    """Reads whole rows, or goes on reading kept ones. Every call communicates alike, whatever is read."""

    keeps_cache: bool

    def new_state(self, offsets: Sequence[int], columns: int) -> Any: ...

    def read(self, readings: Sequence[PrefillChunk], state: Any = None) -> list[torch.Tensor]:
        """Hidden states [number of tokens, H] of each reading."""
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

    def __len__(self) -> int:
        return len(self.prompts)


class TeacherScores(NamedTuple):
    """The teacher's reading of responses, right-padded to N columns.

    ``kl_map`` [B, N] float, nats: KL(teacher || student) at every response position. ``teacher_tokens`` [B, N] int64:
    the teacher's own token there. ``mask`` [B, N] bool: positions that were read.
    """

    kl_map: torch.Tensor
    teacher_tokens: torch.Tensor
    mask: torch.Tensor


class Correction(NamedTuple):
    """The teacher's token for one position of a row."""

    row: int
    position: int
    token: int
