"""How the tokens of a decode batch are written, one after the other, between two looks at which responses have ended.

Looking means to wait for the device. Where that costs nothing it is done after every token; elsewhere every few tokens,
and what was written behind an end is cut off: a random number depends on the place of its token alone, so the texts are
the same.

Shapes: B examples of a cache, of which the first A are being written; H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megadistill.decoding.sampling import Drawer

if TYPE_CHECKING:
    from megadistill.decoding.protocols import Decoder

# Tokens between two looks where looking means to wait: a response that has ended costs half as many on average.
INTERVAL = 8


class Written(NamedTuple):
    """What some steps have written; good until the next ones.

    Attributes:
        tokens: [steps, A] classes, or ``NO_TOKEN``.
        hidden: [steps, A, H] the hidden states that they were drawn from; None where nobody keeps them.
    """

    tokens: Tensor
    hidden: Tensor | None


class TokenSteps(Protocol):
    """Writes tokens into one cache."""

    @property
    def interval(self) -> int:
        """The most steps of a call."""
        ...

    def run(self, tokens: Tensor, column: int, numbers: Tensor | None, num_steps: int) -> Written:
        """Each step reads the tokens of the first slots into a column, and draws the next ones.

        Args:
            tokens: [A] what the first step reads.
            column: Where it puts them; the next step takes the next column.
            numbers: [steps, A] random numbers (``sampling_numbers``); None for greedy sampling.
            num_steps: At most ``interval``.
        """
        ...

    def forget(self, slot: int, column: int) -> None:
        """From a column on, a slot may hold what is not finite, which must not touch what is written there anew."""
        ...


class Recorder(Protocol):
    """Records steps of fixed shapes, to launch each of them at once."""

    def run(self, step: Callable[[], None]) -> None:
        """Runs a step as it will be recorded."""
        ...

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """What runs the step again; recording runs nothing."""
        ...


def rounded_rows(num_active: int, num_slots: int) -> int:
    """Rows of a step of fixed shape: 1, 2, 4, 8, a multiple of 8 up to 32, or of 16; not more than there are slots."""
    unit = 16 if num_active > 32 else 8
    rows = 1 << (num_active - 1).bit_length() if num_active <= 8 else -(-num_active // unit) * unit
    return min(rows, num_slots)


@dataclass(frozen=True)
class Stepping:
    """How a decoder writes tokens.

    Attributes:
        interval: Tokens between two looks at which responses have ended.
        is_static: Steps of fixed shapes (``StaticSteps``), for decoders that have them.
        rounded: (A, B) -> rows of such a step.
        recorder: What records such steps; None where they run as they are.
    """

    interval: int = 1
    is_static: bool = False
    rounded: Callable[[int, int], int] = rounded_rows
    recorder: Callable[[torch.device], Recorder] | None = None


class EagerSteps:
    """Implements ``TokenSteps`` with any decoder: each step is as wide as there are active examples.

    Args:
        model: The decoder.
        state: Its cache.
        drawer: Draws tokens.
        keep_hidden: Hand out hidden states.
        interval: The most steps of a call.
    """

    def __init__(self, model: Decoder, state: Any, drawer: Drawer, *, keep_hidden: bool, interval: int = 1) -> None:
        self.interval = interval
        self._model, self._state, self._drawer, self._keep_hidden = model, state, drawer, keep_hidden

    def run(self, tokens: Tensor, column: int, numbers: Tensor | None, num_steps: int) -> Written:
        """As ``TokenSteps.run``."""
        drawn: list[Tensor] = []
        states: list[Tensor] = []
        for step in range(num_steps):
            if drawn:
                tokens = drawn[-1].clamp_min(0)  # NO_TOKEN is no class
            hidden = self._model.decode(self._state, tokens, column + step)
            drawn.append(self._drawer(self._model.logits(hidden), None if numbers is None else numbers[step]))
            if self._keep_hidden:
                states.append(hidden)
        return Written(_stacked(drawn), _stacked(states) if states else None)

    def forget(self, slot: int, column: int) -> None:
        """Columns behind the one that is read are never looked at."""


def _stacked(rows: list[Tensor]) -> Tensor:
    return rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(rows)
