"""Sequence correction and re-generation (SCRG; paper, Eq. 3-4): the teacher replaces the worst token, the student
writes on.

Shapes: B rows, N response columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megadistill.generation.protocols import Rows, Scorer

NO_ERROR = -1


@dataclass(frozen=True)
class Revision:
    """Corrected rows and, for each row, where its first correction was (-1: none) and how many rounds changed it."""

    rows: Rows
    error_positions: tuple[int, ...]
    num_corrections: tuple[int, ...]


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


def revise(rows: Rows, *, score: Scorer, write_on: Callable[[Rows, int], Rows], rounds: int) -> Revision:
    """Corrects every row ``rounds`` times, each later round only right of the last correction (ours: so rounds end).

    ``score(rows, round)`` is the teacher's reading; ``write_on(rows, round)`` is the student's continuation of the kept
    prefixes. A teacher token that is EOS ends its row. Every rank runs all rounds, whatever its rows look like, because
    scoring communicates.
    """
    first = [NO_ERROR] * len(rows.responses)
    last = [NO_ERROR] * len(rows.responses)
    counts = [0] * len(rows.responses)
    for round_index in range(rounds):
        scores = score(rows, round_index)
        width = scores.kl_map.shape[1]
        columns = torch.arange(width, device=scores.mask.device)
        # A row without an error in one round is unchanged and would be found without one again.
        is_open = torch.tensor(
            [round_index == 0 or count == round_index for count in counts], device=scores.mask.device
        )
        right_of_last = columns[None] > torch.tensor(last, device=scores.mask.device)[:, None]
        student_tokens = torch.tensor(
            [[*response, *[0] * (width - len(response))] for response in rows.responses],
            device=scores.mask.device,
            dtype=torch.int64,
        ).reshape(len(rows.responses), width)
        positions = find_error_positions(
            scores.kl_map, student_tokens, scores.teacher_tokens, scores.mask & right_of_last & is_open[:, None]
        ).tolist()
        prefixes = []
        for row, (response, position) in enumerate(zip(rows.responses, positions, strict=True)):
            if position == NO_ERROR:
                prefixes.append(response)
                continue
            prefixes.append((*response[:position], int(scores.teacher_tokens[row, position])))
            first[row] = position if first[row] == NO_ERROR else first[row]
            last[row], counts[row] = position, counts[row] + 1
        rows = _write_on_changed(rows, prefixes, positions, write_on, round_index)
    return Revision(rows, tuple(first), tuple(counts))


def _write_on_changed(
    rows: Rows,
    prefixes: list[tuple[int, ...]],
    positions: list[int],
    write_on: Callable[[Rows, int], Rows],
    round_index: int,
) -> Rows:
    """The student continues the corrected rows; the others (which may have been cut by the limit) stay untouched."""
    changed = [row for row, position in enumerate(positions) if position != NO_ERROR]
    if not changed:
        return rows
    part = Rows(
        tuple(rows.sequence_ids[row] for row in changed),
        tuple(rows.prompts[row] for row in changed),
        tuple(prefixes[row] for row in changed),
    )
    written = write_on(part, round_index)
    responses = list(rows.responses)
    for row, response in zip(changed, written.responses, strict=True):
        responses[row] = response
    return rows.with_responses(responses)
