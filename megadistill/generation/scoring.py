"""Where student and teacher disagree in student text, and what the teacher would have written.

Shapes: B examples, N response positions, T scored response tokens of all examples, H hidden size, H_T the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megadistill.config.loss import Backend
from megadistill.decoding.protocols import TextModel
from megadistill.decoding.sampling import draw_tokens, sampling_numbers
from megadistill.losses import Head, token_kl
from megadistill.parallel.output_head import OutputHead
from megadistill.parallel.rng import Stream


class TeacherScores(NamedTuple):
    """The teacher's view of responses, right-padded to N columns.

    Attributes:
        kl_map: [B, N] float, KL(teacher || student) in nats at every response position.
        teacher_tokens: [B, N] int64, the teacher's own token there.
        mask: [B, N] bool, positions that were scored.
    """

    kl_map: torch.Tensor
    teacher_tokens: torch.Tensor
    mask: torch.Tensor


def score_responses(
    lengths: Sequence[int],
    starts: Sequence[int],
    sequence_ids: Sequence[int],
    *,
    student_hidden: Sequence[torch.Tensor],
    student_head: OutputHead,
    teacher_hidden: Sequence[torch.Tensor],
    teacher: TextModel,
    seed: int,
    round_index: int,
    sample_teacher: bool,
    backend: Backend = "auto",
) -> TeacherScores:
    """KL map and teacher tokens of every response position from ``starts[i]`` on (method.md section 1).

    Gathers the teacher's head once over the data-parallel group. Communicates over the tensor-parallel group as
    ``token_kl`` does, and for sampled teacher tokens as ``draw_tokens`` does.

    Args:
        lengths: Response lengths.
        starts: First position of each response that is scored.
        sequence_ids: Key the random numbers of the teacher's tokens.
        student_hidden: [length - start, H] of each example.
        student_head: The student's head.
        teacher_hidden: [length - start, H_T] of each example.
        teacher: The model whose head is used.
        seed: Keys the random numbers, with ``round_index``.
        round_index: Round of SCRG.
        sample_teacher: Sample the teacher's tokens from the logits that the KL is computed from; otherwise take its
            most likely ones.
        backend: What runs the losses.
    """
    shard, device = student_head.shard, student_head.weight.device
    length = torch.tensor(list(lengths), device=device)
    columns = torch.arange(int(length.max()), device=device)
    first = torch.tensor(list(starts), device=device)
    mask = (columns[None] >= first[:, None]) & (columns[None] < length[:, None])
    example, column = mask.nonzero(as_tuple=True)
    ids = torch.tensor(list(sequence_ids), device=device)[example]
    numbers = sampling_numbers(seed, ids, column, stream=Stream.TEACHER_TOKEN + round_index)
    drawn = torch.zeros(len(example), dtype=torch.int64, device=device)

    def draw(chunk: slice, logits: torch.Tensor) -> None:
        drawn[chunk] = draw_tokens(logits, shard, numbers[chunk])

    with teacher.head() as teacher_head:
        kl, top1 = token_kl(
            Head.of(_concatenated(student_hidden, student_head.weight), student_head),
            Head.of(_concatenated(teacher_hidden, teacher_head.weight), teacher_head),
            shard,
            backend=backend,
            visit=draw if sample_teacher else None,
        )
    kl_map = torch.zeros(mask.shape, dtype=kl.dtype, device=device)
    token_map = torch.zeros(mask.shape, dtype=torch.int64, device=device)
    kl_map[mask] = kl
    token_map[mask] = drawn if sample_teacher else top1
    return TeacherScores(kl_map, token_map, mask)


def _concatenated(hidden: Sequence[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """[T, H] of all examples; [0, H] where there are no tokens."""
    present = [states for states in hidden if len(states)]
    return torch.cat(present) if present else weight.new_zeros(0, weight.shape[1])
