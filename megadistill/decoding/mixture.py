"""Two models that write one text side by side, each token drawn from a mixture of their distributions.

A token of a p + (1 - a) q is one of p with probability a, and one of q otherwise. So one random number does both: which
part of the mixture it falls into, and the place within that part.

Shapes: B examples, Vs this rank's slice of the vocabulary, H hidden sizes of student and teacher together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megadistill.decoding.protocols import Decoder
from megadistill.decoding.sampling import Drawer, Sampling
from megadistill.decoding.token_steps import INTERVAL, EagerSteps
from megadistill.parallel.vocab import VocabShard


class _Both(NamedTuple):
    """The caches of both models, whose slots move together."""

    student: Any
    teacher: Any

    def swap(self, a: int, b: int) -> None:
        """Exchanges two slots."""
        self.student.swap(a, b)
        self.teacher.swap(a, b)

    def sort(self, order: Sequence[int]) -> None:
        """Reorders all slots."""
        self.student.sort(order)
        self.teacher.sort(order)


class MixtureDrawer(Drawer):
    """Draws from the mixture; takes both models' logits, the student's first.

    Args:
        shard: This rank's slice of the vocabulary.
        sampling: How tokens of either part are drawn; not greedy.
        most_examples: The most examples of a call.
        teacher_share: a, the teacher's share of the mixture, in (0, 1).
    """

    def __init__(self, shard: VocabShard, sampling: Sampling, most_examples: int, teacher_share: float) -> None:
        super().__init__(shard, sampling, most_examples)
        self._teacher_share = teacher_share

    @torch.no_grad()
    def __call__(self, logits_shard: Tensor, numbers: Tensor | None) -> Tensor:
        """As ``draw_tokens``, of logits [B, 2 Vs]; each model is asked for the tokens of its part alone."""
        assert numbers is not None, "a mixture is drawn"
        share = self._teacher_share
        student, teacher = logits_shard.chunk(2, -1)
        is_teachers = numbers < share
        inside = torch.where(is_teachers, numbers / share, (numbers - share) / (1 - share))
        inside = inside.clamp(2.0**-53, 1 - 2.0**-52)  # as ``sampling_numbers``, whatever round-off did
        return super().__call__(torch.where(is_teachers.unsqueeze(-1), teacher, student), inside)


class MixtureDecoder:
    """Implements ``decoding.protocols.Decoder`` with two of them, which read the same tokens.

    What it calls hidden states are both models' beside one another; its logits, too.

    Args:
        student: One model; its shard and device are this decoder's.
        teacher: The other one, whose vocabulary is split in the same way.
    """

    def __init__(self, student: Decoder, teacher: Decoder) -> None:
        ours, theirs = student.shard, teacher.shard
        assert (ours.start, ours.stop, ours.total) == (theirs.start, theirs.stop, theirs.total)
        self._student, self._teacher = student, teacher
        self.shard, self.device, self.head = ours, student.device, student.head
        self._widths, self._dtypes = (0, 0), (torch.float32, torch.float32)

    def new_state(self, offsets: Sequence[int], columns: int) -> _Both:
        """Empty caches."""
        return _Both(self._student.new_state(offsets, columns), self._teacher.new_state(offsets, columns))

    def prefill(self, state: _Both, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Hidden states [B, H] of the last tokens."""
        return self._joined(
            self._student.prefill(state.student, prompts), self._teacher.prefill(state.teacher, prompts)
        )

    def decode(self, state: _Both, tokens: Tensor, column: int) -> Tensor:
        """Hidden states [B, H] of one more token."""
        return self._joined(
            self._student.decode(state.student, tokens, column), self._teacher.decode(state.teacher, tokens, column)
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """[B, 2 Vs]: the student's logits, then the teacher's."""
        student, teacher = hidden.split(self._widths, -1)
        ours, theirs = self._dtypes
        return torch.cat([self._student.logits(student.to(ours)), self._teacher.logits(teacher.to(theirs))], -1)

    def steps(self, state: _Both, drawer: Drawer, *, keep_hidden: bool) -> EagerSteps:
        """One token after the other, not recorded."""
        interval = INTERVAL if self.device.type == "cuda" else 1
        return EagerSteps(self, state, drawer, keep_hidden=keep_hidden, interval=interval)

    def _joined(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Both beside one another in the wider type, which holds either exactly."""
        self._widths, self._dtypes = (student.shape[-1], teacher.shape[-1]), (student.dtype, teacher.dtype)
        return torch.cat([student, teacher], -1)
