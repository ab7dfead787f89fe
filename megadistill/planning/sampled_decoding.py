"""Decoding of which only some steps run: the others are counted from these.

With as many rows, a decoding step makes the same calls at every column, and its floating-point operations grow by the
same number from column to column. So two steps tell the others exactly. What surrounds a step (logits, drawing tokens,
moving rows) always runs. Steps that are recorded cost nothing to repeat: they all run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch

from megadistill.decoding.protocols import Decoder, Prefiller, TextModel
from megadistill.decoding.sampling import Drawer
from megadistill.decoding.token_steps import EagerSteps, TokenSteps, Written
from megadistill.parallel.output_head import OutputHead
from megadistill.parallel.vocab import VocabShard
from megadistill.planning.counter import Counter, Tally

# The first steps of a cache always run: they make what later ones find.
_FIRST_STEPS = 5


class _Step(NamedTuple):
    column: int
    made: Tally


class CountedWriter:
    """The student as text sources see it, with decoding steps counted.

    Args:
        model: The student.
        counter: What counts.
        skips: Run only as many decoding steps as are needed to know the others.

    Attributes:
        num_steps: Decoding steps so far, those that did not run included.
        num_run: Those that ran.
    """

    def __init__(self, model: TextModel, counter: Counter, *, skips: bool) -> None:
        self.model, self.counter, self.skips = model, counter, skips
        self.num_steps = self.num_run = 0

    @property
    def shard(self) -> VocabShard:
        """This rank's slice of the vocabulary."""
        return self.model.shard

    @contextmanager
    def decoder(self) -> Iterator[Decoder]:
        """The model's decoder."""
        with self.model.decoder() as decoder:
            yield _SampledDecoder(decoder, self)

    def prefiller(self, examples_per_pass: int) -> Prefiller:
        """The model's prefiller."""
        return self.model.prefiller(examples_per_pass)

    def head(self) -> AbstractContextManager[OutputHead]:
        """The model's head."""
        return self.model.head()


class _SampledDecoder:
    """Passes everything on to a decoder but the steps that need not run."""

    def __init__(self, decoder: Decoder, writer: CountedWriter) -> None:
        self._decoder, self._writer = decoder, writer
        self._last_column = self._num_run = 0
        self._steps: dict[int, list[_Step]] = {}  # rows -> the last two steps that ran
        self._hidden: dict[int, torch.Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def new_state(self, offsets: Sequence[int], columns: int) -> Any:
        """As the decoder's; steps of another cache are not like those of this one."""
        self._steps.clear()
        self._num_run = 0
        self._last_column = columns - 2  # the last token of a row is written and not read
        return self._decoder.new_state(offsets, columns)

    def steps(self, state: Any, drawer: Drawer, *, keep_hidden: bool) -> TokenSteps:
        """As the decoder's, with its steps counted."""
        steps = self._decoder.steps(state, drawer, keep_hidden=keep_hidden)
        if isinstance(steps, EagerSteps):
            return EagerSteps(self, state, drawer, keep_hidden=keep_hidden, interval=steps.interval)
        return _CountedSteps(steps, self._writer)

    def decode(self, state: Any, tokens: torch.Tensor, column: int) -> torch.Tensor:
        """As the decoder's, or a tensor of its shape with what it would have done counted."""
        writer, rows = self._writer, len(tokens)
        writer.num_steps += 1
        known = self._steps.setdefault(rows, [])
        if writer.skips and self._num_run >= _FIRST_STEPS and column < self._last_column and _is_known(known):
            writer.counter.repeat(_extrapolated(known, column))
            return torch.empty_like(self._hidden[rows])
        writer.num_run, self._num_run = writer.num_run + 1, self._num_run + 1
        before = writer.counter.tally.copy()
        hidden = self._decoder.decode(state, tokens, column)
        known.append(_Step(column, writer.counter.since(before)))
        del known[:-2]
        self._hidden[rows] = hidden
        return hidden


class _CountedSteps:
    """Passes everything on, and counts the steps."""

    def __init__(self, steps: TokenSteps, writer: CountedWriter) -> None:
        self.interval, self.forget = steps.interval, steps.forget
        self._steps, self._writer = steps, writer

    def run(self, tokens: torch.Tensor, column: int, numbers: torch.Tensor | None, num_steps: int) -> Written:
        """As ``TokenSteps.run``."""
        self._writer.num_steps += num_steps
        self._writer.num_run += num_steps
        return self._steps.run(tokens, column, numbers, num_steps)


def _is_known(steps: Sequence[_Step]) -> bool:
    """Whether two steps made the same calls and their columns tell how operations grow."""
    if len(steps) < 2 or steps[0].column == steps[1].column:
        return False
    grown, columns = steps[1].made.flops - steps[0].made.flops, steps[1].column - steps[0].column
    return steps[0].made.same_calls(steps[1].made) and grown % columns == 0


def _extrapolated(steps: Sequence[_Step], column: int) -> Tally:
    first, second = steps
    grown = (second.made.flops - first.made.flops) // (second.column - first.column)
    made = second.made.copy()
    made.flops += grown * (column - second.column)
    return made
