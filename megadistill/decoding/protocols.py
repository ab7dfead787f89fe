"""What a model must offer to write and read text. Text sources and decoding use nothing else, so fakes can stand in.

Shapes: B examples, in ``decode`` those still being written; H hidden size, Vs this rank's slice of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from megadistill.decoding.kv_cache import PrefillChunk
from megadistill.decoding.sampling import Drawer
from megadistill.decoding.token_steps import TokenSteps
from megadistill.parallel.output_head import OutputHead
from megadistill.parallel.vocab import VocabShard


class Decoder(Protocol):
    """A causal decoder over preallocated columns. Communicates over the tensor-parallel group only."""

    @property
    def shard(self) -> VocabShard:
        """This rank's slice of the vocabulary."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        ...

    @property
    def head(self) -> OutputHead:
        """The output head."""
        ...

    def new_state(self, offsets: Sequence[int], columns: int) -> Any:
        """An empty cache of ``columns`` columns for examples whose first columns are ``offsets``.

        Its ``swap(a, b)`` exchanges two slots, its ``sort(order)`` reorders all of them.
        """
        ...

    def prefill(self, state: Any, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Reads prompts that all end in the same column; hidden states [B, H] that predict the first tokens."""
        ...

    def decode(self, state: Any, tokens: torch.Tensor, column: int) -> torch.Tensor:
        """Reads tokens [B] into a column of the first B slots, whatever it held; returns hidden states [B, H]."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's logits [B, Vs] of hidden states [B, H]."""
        ...

    def steps(self, state: Any, drawer: Drawer, *, keep_hidden: bool) -> TokenSteps:
        """What writes tokens into a state, several at a time where waiting for the device would cost."""
        ...


class Prefiller(Protocol):
    """Reads given text, or continues where it stopped. Every call communicates in the same way, whatever it reads."""

    @property
    def keeps_cache(self) -> bool:
        """Whether ``read`` can keep keys and values in a state."""
        ...

    def new_state(self, offsets: Sequence[int], columns: int) -> Any:
        """An empty cache, as ``Decoder.new_state``; only where ``keeps_cache``."""
        ...

    def read(self, chunks: Sequence[PrefillChunk], state: Any = None) -> list[torch.Tensor]:
        """Hidden states [number of tokens, H] of each chunk."""
        ...


class TextModel(Protocol):
    """A (partitioned) model that can write and read text."""

    @property
    def shard(self) -> VocabShard:
        """This rank's slice of the vocabulary."""
        ...

    def decoder(self) -> AbstractContextManager[Decoder]:
        """A decoder with all parameters gathered once, for as long as it is used."""
        ...

    def prefiller(self, examples_per_pass: int) -> Prefiller:
        """Reads text; a model without a decoder plan reads ``examples_per_pass`` examples at a time."""
        ...

    def head(self) -> AbstractContextManager[OutputHead]:
        """The output head, gathered once for as long as it is used."""
        ...
