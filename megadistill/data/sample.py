"""One example on its way through a step: the record that text sources, decoding and the losses share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

NO_ERROR = -1
TokenIds = tuple[int, ...]


class RowLoss(NamedTuple):
    """The token loss of a row of its own (``generation.mode`` contrast).

    Attributes:
        divergence: In place of ``loss.divergence``.
        skew: In place of ``loss.skew``; None: that.
        weight: Factor of the row.
    """

    divergence: str
    skew: float | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Sample:
    """A prompt of this data-parallel rank, and what a step makes of it.

    Each stage of a step returns a copy with more fields filled in.

    Attributes:
        sequence_id: Global number that never repeats within a run (except for replayed samples, which keep theirs). It
            keys every random number that belongs to the sample, whatever the layout.
        prompt_ids: Tokens of the prompt.
        prompt: Text of the prompt, for samples.jsonl.
        targets: Spans [start, end) of ``prompt_ids`` that get the reference loss, too: earlier turns of the assistant.
        reference_ids: Tokens of the reference, its end token included; None where there is none, or where it must not
            be used.
        response_ids: Tokens that the teacher's losses are computed on; None for no such loss. Where they are the
            reference they are the same object.
        rollout_ids: What the student wrote in this step, before any correction; None where it wrote nothing.
        teacher_hidden: [len(response_ids), H] the teacher's hidden states that predict ``response_ids``.
        pair_mask: ``pair_mask[t]`` is True where response tokens t and t + 1 are in one span.
        error_position: Response position of the first correction, ``NO_ERROR`` for none.
        num_corrections: Rounds of SCRG that changed the response.
        row_loss: Its own token loss; None: as the configuration says.
        temperatures: [len(response_ids)] the temperature of the token loss at each token, 0 where it has none; None:
            ``loss.temperature`` at all of them.
        is_finite: False where the student's logits were NaN or infinite while it wrote, which ended the response.
    """

    sequence_id: int
    prompt_ids: TokenIds
    prompt: str = ""
    reference_ids: TokenIds | None = None
    response_ids: TokenIds | None = None
    rollout_ids: TokenIds | None = None
    teacher_hidden: Tensor | None = None
    pair_mask: Sequence[bool] = ()
    error_position: int = NO_ERROR
    num_corrections: int = 0
    is_finite: bool = True
    targets: Sequence[tuple[int, int]] = ()
    row_loss: RowLoss | None = None
    temperatures: Tensor | None = None

    @property
    def num_response_tokens(self) -> int:
        """Tokens with a token loss."""
        if self.temperatures is not None:
            return int((self.temperatures > 0).sum())
        return len(self.response_ids or ())

    @property
    def num_reference_tokens(self) -> int:
        """Tokens with a reference loss."""
        if self.reference_ids is None:
            return 0
        return len(self.reference_ids) + sum(end - start for start, end in self.targets)
