"""The teacher's reading of student text: where the two disagree, and what the teacher would have written.

Shapes: B rows, S columns, N response columns, n response tokens of all rows, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch.nn import functional as F

from megadistill.data.collate import IGNORE_INDEX, right_padded
from megadistill.generation.policy import STREAM_TEACHER_TOKEN
from megadistill.generation.protocols import Rows, Scores
from megadistill.generation.sampling import sample_tokens
from megadistill.losses import Head, token_kl
from megadistill.losses.config import Backend
from megadistill.parallel.vocab import VocabShard

HiddenFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
HeadContext = Callable[[], AbstractContextManager[tuple[torch.Tensor, torch.Tensor | None]]]
_SAMPLE_CHUNK = 256


def response_hidden(
    hidden: HiddenFunction, rows: Rows, *, pad_id: int, device: torch.device, rows_per_pass: int
) -> list[torch.Tensor]:
    """Hidden states that predict each response token: one [length of the response, H] tensor a row.

    ``hidden(input_ids, attention_mask, position_ids)`` is called ceil(B / rows_per_pass) times, however long the rows
    are: under ZeRO-3 all data-parallel ranks must make the same number of calls, so B is the same on all of them.
    """
    found: list[torch.Tensor] = []
    sequences = list(zip(rows.prompts, rows.responses, strict=True))
    for start in range(0, len(sequences), rows_per_pass):
        batch = right_padded(sequences[start : start + rows_per_pass], pad_id)
        states = hidden(batch.input_ids.to(device), batch.attention_mask.to(device), batch.position_ids.to(device))
        is_response = (batch.labels != IGNORE_INDEX).to(device)
        found.extend(row_states[row_mask] for row_states, row_mask in zip(states, is_response, strict=True))
    return found


def score_rows(
    rows: Rows,
    *,
    student_hidden: Sequence[torch.Tensor],
    student_head: tuple[torch.Tensor, torch.Tensor | None],
    teacher_hidden: Sequence[torch.Tensor],
    teacher_head: HeadContext,
    shard: VocabShard,
    seed: int,
    round_index: int,
    sample_teacher: bool,
    backend: Backend = "auto",
) -> Scores:
    """KL map and teacher tokens of every response position (method.md section 1).

    Communicates over the tensor-parallel group as ``token_kl`` and ``sample_tokens`` do, and gathers the teacher's
    head once.
    """
    device = student_hidden[0].device
    lengths = torch.tensor([len(response) for response in rows.responses], device=device)
    mask = torch.arange(int(lengths.max()), device=device)[None] < lengths[:, None]
    student = Head(torch.cat(list(student_hidden)), *student_head)
    with teacher_head() as (weight, bias):
        teacher = Head(torch.cat(list(teacher_hidden)), weight, bias)
        kl, teacher_tokens = token_kl(student, teacher, shard, backend=backend)
        if sample_teacher:
            sequence_ids = torch.tensor(rows.sequence_ids, device=device).repeat_interleave(lengths)
            positions = torch.cat([torch.arange(n, device=device) for n in lengths.tolist()])
            teacher_tokens = _sample_from_head(
                teacher, shard, seed, sequence_ids, positions, STREAM_TEACHER_TOKEN + round_index
            )
    kl_map = torch.zeros(mask.shape, dtype=kl.dtype, device=device)
    token_map = torch.zeros(mask.shape, dtype=torch.int64, device=device)
    kl_map[mask], token_map[mask] = kl, teacher_tokens
    return Scores(kl_map, token_map, mask)


@torch.no_grad()
def _sample_from_head(
    head: Head, shard: VocabShard, seed: int, sequence_ids: torch.Tensor, positions: torch.Tensor, stream: int
) -> torch.Tensor:
    """One teacher token [n] per row, from logits that exist a chunk at a time."""
    dtype = torch.float64 if head.hidden.dtype == torch.float64 else torch.float32
    weight, bias = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)
    tokens = [
        sample_tokens(
            F.linear(hidden.to(dtype), weight, bias),
            shard,
            seed=seed,
            sequence_ids=ids,
            positions=at,
            stream=stream,
        )
        for hidden, ids, at in zip(
            head.hidden.split(_SAMPLE_CHUNK),
            sequence_ids.split(_SAMPLE_CHUNK),
            positions.split(_SAMPLE_CHUNK),
            strict=True,
        )
    ]
    return torch.cat(tokens)
