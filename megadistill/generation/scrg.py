"""Sequence correction and re-generation (SCRG; paper, Eq. 3-4): the teacher replaces the worst token, the student
writes on.

Shapes: B rows, N response columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megadistill.decoding.protocols import Correction, Rows, TeacherScores

NO_ERROR = -1


@dataclass(frozen=True)
class Revision:
    """Corrected rows and, for each row, where its first correction was (-1: none), how many rounds changed it, and from
    which position on the teacher has not read it (its length: all is read)."""

    rows: Rows
    error_positions: tuple[int, ...]
    num_corrections: tuple[int, ...]
    unread_from: tuple[int, ...]


def find_error_positions(
    kl_map: torch.Tensor, student_tokens: torch.Tensor, teacher_tokens: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Paper, Eq. 3: the position of the largest KL among those where student and teacher disagree.

    Args: ``kl_map`` [B, N] nats; ``student_tokens``, ``teacher_tokens`` [B, N] int64; ``mask`` [B, N] bool, positions
    to look at. Returns [B] int64; ties go to the earliest position, -1 where there is no disagreement. No
    communication: the inputs are equal on all tensor-parallel ranks.
    """
    candidates = mask.bool() & (student_tokens != teacher_tokens)
    if kl_map.shape[1] == 0:
        return torch.full(kl_map.shape[:1], NO_ERROR, dtype=torch.int64, device=kl_map.device)
    kl = torch.where(candidates, kl_map, torch.full_like(kl_map, -torch.inf))
    is_largest = candidates & (kl == kl.amax(dim=1, keepdim=True))
    # argmax of an integer ramp: torch promises no order among equal maxima, so the ramp makes the first one the
    # largest.
    ramp = torch.arange(kl_map.shape[1], 0, -1, device=kl_map.device)
    return torch.where(is_largest.any(dim=1), (is_largest * ramp).argmax(dim=1), NO_ERROR)


def revise(
    rows: Rows,
    *,
    score: Callable[[Rows, Sequence[int], int], TeacherScores],
    rewrite: Callable[[Sequence[Correction], int], Rows],
    rounds: int,
) -> Revision:
    """Corrects every row ``rounds`` times, each later round only right of the last correction (ours: so rounds end).

    ``score(rows, starts, round)`` is the teacher's reading of each response from ``starts[row]`` on; what lies left of
    it has been scored. ``rewrite(corrections, round)`` puts the teacher's tokens in and lets the student write on; a
    teacher token that is EOS ends its row. Every rank runs all rounds, whatever its rows look like, because scoring
    communicates.
    """
    first = [NO_ERROR] * len(rows)
    starts = [0] * len(rows)
    counts = [0] * len(rows)
    for round_index in range(rounds):
        scores = score(rows, starts, round_index)
        positions = find_error_positions(
            scores.kl_map, _padded(rows.responses, scores.mask), scores.teacher_tokens, scores.mask
        ).tolist()
        tokens = scores.teacher_tokens.tolist()
        corrections = [
            Correction(row, position, tokens[row][position])
            for row, position in enumerate(positions)
            if position != NO_ERROR
        ]
        rows = rewrite(corrections, round_index)
        # A row without an error is unchanged, and would be found without one again.
        starts = [len(response) for response in rows.responses]
        for row, position, _ in corrections:
            first[row] = position if first[row] == NO_ERROR else first[row]
            starts[row], counts[row] = position + 1, counts[row] + 1
    return Revision(rows, tuple(first), tuple(counts), tuple(starts))


def _padded(responses: Sequence[Sequence[int]], mask: torch.Tensor) -> torch.Tensor:
    width = mask.shape[1]
    padded = [[*response, *[0] * (width - len(response))] for response in responses]
    return torch.tensor(padded, dtype=torch.int64, device=mask.device).reshape(mask.shape)
