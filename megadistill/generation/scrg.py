"""Sequence correction and re-generation (SCRG; paper, Eq. 3-4): which token of a response the teacher corrects.

The loop around it, in which the student writes, the teacher corrects and the student continues, is
``sources/on_policy.py``. Shapes: B examples, N response positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch

from megadistill.config.schema import ScrgSection
from megadistill.data.sample import NO_ERROR, TokenIds
from megadistill.decoding.rollout import Correction
from megadistill.generation.scoring import TeacherScores, padded_tokens


@dataclass(frozen=True)
class ErrorRule:
    """Which disagreement of a response is its error (docs/method.md, section 1).

    Attributes:
        error: ``kl``: that of the largest KL (paper). ``regret``: where the teacher's best token is most likelier than
            the one that was written. ``first``: the first one whose KL is above ``threshold``. ``rank``: the first
            written token that is not among the teacher's ``threshold`` best (speculative knowledge distillation).
        threshold: Nats (first) or a rank (rank).
        competence: Look only where the geometric mean of the teacher's probabilities of the text before is at least
            this; 0: everywhere.
    """

    error: Literal["kl", "regret", "first", "rank"] = "kl"
    threshold: float = 0.0
    competence: float = 0.0

    @classmethod
    def of(cls, scrg: ScrgSection) -> Self:
        """The rule of a configuration."""
        return cls(scrg.error, scrg.threshold, scrg.competence)

    @property
    def reads_text(self) -> bool:
        """Whether the teacher's view of the written tokens is needed."""
        return self.error in ("regret", "rank") or self.competence > 0


def find_error_positions(
    kl_map: torch.Tensor, student_tokens: torch.Tensor, teacher_tokens: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Paper, Eq. 3: the position of the largest KL among those where student and teacher disagree.

    No communication: the inputs are equal on all tensor-parallel ranks.

    Args:
        kl_map: [B, N] nats.
        student_tokens: [B, N] int64.
        teacher_tokens: [B, N] int64.
        mask: [B, N] bool, positions to look at.

    Returns:
        [B] int64; ties go to the earliest position; ``NO_ERROR`` where there is no disagreement.
    """
    return error_positions(TeacherScores(kl_map, teacher_tokens, mask.bool()), student_tokens, ErrorRule())


def error_positions(scores: TeacherScores, student_tokens: torch.Tensor, rule: ErrorRule) -> torch.Tensor:
    """The error position of each response by a rule.

    Args:
        scores: The teacher's view of the responses.
        student_tokens: [B, N] int64.
        rule: The rule.

    Returns:
        [B] int64; ties go to the earliest position; ``NO_ERROR`` where there is none.
    """
    candidates = scores.mask & (student_tokens != scores.teacher_tokens)
    if rule.reads_text:
        assert scores.text is not None, "made without the teacher's view of the text"
    if rule.competence > 0:
        assert scores.text is not None
        candidates &= _still_follows(scores.text.log_p, scores.mask, rule.competence)
    if rule.error == "first":
        return _first(candidates & (scores.kl_map > rule.threshold))
    if rule.error == "rank":
        assert scores.text is not None
        return _first(candidates & (scores.text.rank >= rule.threshold))
    values = scores.kl_map
    if rule.error == "regret":
        assert scores.text is not None
        values = scores.text.regret
    if values.shape[1] == 0:
        return _first(candidates)
    values = torch.where(candidates, values, -torch.inf)
    return _first(candidates & (values == values.amax(dim=1, keepdim=True)))


def _first(is_error: torch.Tensor) -> torch.Tensor:
    """The first True of each row; ``NO_ERROR`` where there is none."""
    width = is_error.shape[1]
    if width == 0:
        return torch.full(is_error.shape[:1], NO_ERROR, dtype=torch.int64, device=is_error.device)
    # torch promises no order among equal maxima; on a descending ramp the first of them is the largest.
    ramp = torch.arange(width, 0, -1, device=is_error.device)
    return torch.where(is_error.any(dim=1), (is_error * ramp).argmax(dim=1), NO_ERROR)


def _still_follows(log_p: torch.Tensor, mask: torch.Tensor, competence: float) -> torch.Tensor:
    """Where the teacher's mean log-probability of what was scored before is at least log(competence) [B, N]."""
    scored = torch.where(mask, log_p.double(), 0.0)
    before = scored.cumsum(1) - scored
    number = mask.cumsum(1) - mask.long()
    return before >= math.log(competence) * number


def find_corrections(
    responses: Sequence[TokenIds], scores: TeacherScores, rule: ErrorRule | None = None
) -> list[Correction]:
    """The teacher's token at the error position of every response that has one (waits for the device once).

    Args:
        responses: Response ids of each example.
        scores: The teacher's view of them.
        rule: Which disagreement is the error; None: the paper's.
    """
    student_tokens = padded_tokens(responses, scores.mask)
    positions = error_positions(scores, student_tokens, rule or ErrorRule()).tolist()
    tokens = scores.teacher_tokens.tolist()
    return [
        Correction(example, position, tokens[example][position])
        for example, position in enumerate(positions)
        if position != NO_ERROR
    ]
