"""Sequence correction and re-generation (SCRG; paper, Eq. 3-4): which token of a response the teacher corrects.

The loop around it, in which the student writes, the teacher corrects and the student continues, is
``sources/on_policy.py``. Shapes: B examples, N response positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megadistill.data.sample import NO_ERROR, TokenIds
from megadistill.decoding.rollout import Correction
from megadistill.generation.scoring import TeacherScores


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
    candidates = mask.bool() & (student_tokens != teacher_tokens)
    if kl_map.shape[1] == 0:
        return torch.full(kl_map.shape[:1], NO_ERROR, dtype=torch.int64, device=kl_map.device)
    kl = torch.where(candidates, kl_map, torch.full_like(kl_map, -torch.inf))
    is_largest = candidates & (kl == kl.amax(dim=1, keepdim=True))
    # torch promises no order among equal maxima; on a descending ramp the first of them is the largest.
    ramp = torch.arange(kl_map.shape[1], 0, -1, device=kl_map.device)
    return torch.where(is_largest.any(dim=1), (is_largest * ramp).argmax(dim=1), NO_ERROR)


def find_corrections(responses: Sequence[TokenIds], scores: TeacherScores) -> list[Correction]:
    """The teacher's token at the error position of every response that has one (waits for the device once).

    Args:
        responses: Response ids of each example.
        scores: The teacher's view of them.
    """
    width = scores.mask.shape[1]
    padded = [[*response, *[0] * (width - len(response))] for response in responses]
    student_tokens = torch.tensor(padded, dtype=torch.int64, device=scores.mask.device).reshape(scores.mask.shape)
    positions = find_error_positions(scores.kl_map, student_tokens, scores.teacher_tokens, scores.mask).tolist()
    tokens = scores.teacher_tokens.tolist()
    return [
        Correction(example, position, tokens[example][position])
        for example, position in enumerate(positions)
        if position != NO_ERROR
    ]
