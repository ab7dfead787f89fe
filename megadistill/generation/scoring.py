"""The teacher's reading of student text: where the two disagree, and what the teacher would have written.

Shapes: B rows, N response columns, n response tokens of all rows, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from megadistill.decoding.kv_cache import PrefillChunk
from megadistill.decoding.protocols import Prefiller, Rows, TeacherScores
from megadistill.decoding.sampling import draw_tokens
from megadistill.generation.policy import STREAM_TEACHER_TOKEN
from megadistill.losses import Head, token_kl
from megadistill.losses.config import Backend
from megadistill.parallel.rng import uniform
from megadistill.parallel.vocab import VocabShard

HeadContext = Callable[[], AbstractContextManager[tuple[torch.Tensor, torch.Tensor | None]]]


class TeacherStates:
    """Text of a wave of rows as a model reads it: ``hidden[row]`` [length of the response, H] predict its tokens.

    A correction changes the end of a row only, so its beginning is read once: with a reader that keeps its cache
    nothing is read twice, another one reads changed rows anew. Each ``update`` is one call of the reader.
    """

    def __init__(self, reader: Prefiller, prompts: Sequence[Sequence[int]], max_columns: int, *, keep: bool) -> None:
        self._reader, self._prompts = reader, prompts
        self._state = reader.new_state([0] * len(prompts), max_columns) if keep and reader.keeps_cache else None
        self.hidden: list[torch.Tensor | None] = [None] * len(prompts)

    def update(self, responses: Sequence[Sequence[int]], starts: Sequence[int]) -> None:
        """Reads ``responses[row]`` whose tokens from ``starts[row]`` on are predicted by states not yet known."""
        readings, places = [], []
        for row, (prompt, response, start) in enumerate(zip(self._prompts, responses, starts, strict=True)):
            if not self._reader.keeps_cache:
                # Such a reader makes a call for every few rows: all rows, or ranks would differ in the number of calls.
                start = 0
            elif start >= len(response):
                kept = self.hidden[row]
                self.hidden[row] = None if kept is None else kept[: len(response)]
                continue
            if start and self._state is not None:
                first, tokens = len(prompt) + start - 1, response[start - 1 : -1]
            else:
                start, first, tokens = 0, 0, (*prompt, *response[:-1])
            readings.append(PrefillChunk(row, first, tokens))
            places.append((row, start, len(response)))
        states = self._reader.read(readings, self._state)
        for (row, start, length), found in zip(places, states, strict=True):
            kept = self.hidden[row]
            new = found[len(found) - (length - start) :]
            self.hidden[row] = new if start == 0 or kept is None else torch.cat([kept[:start], new])


def score_rows(
    rows: Rows,
    starts: Sequence[int],
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
) -> TeacherScores:
    """KL map and teacher tokens of every response position from ``starts[row]`` on (method.md section 1).

    ``student_hidden``, ``teacher_hidden``: [length - start, H] a row. Communicates over the tensor-parallel group as
    ``token_kl`` does, and for sampled teacher tokens as ``draw_tokens`` does, and gathers the teacher's head once. The
    teacher's tokens are drawn from the logits of which the KL is computed.
    """
    device = student_head[0].device
    lengths = torch.tensor([len(response) for response in rows.responses], device=device)
    columns = torch.arange(int(lengths.max()), device=device)
    first = torch.tensor(list(starts), device=device)
    mask = (columns[None] >= first[:, None]) & (columns[None] < lengths[:, None])
    row, column = mask.nonzero(as_tuple=True)
    sequence_ids = torch.tensor(rows.sequence_ids, device=device)[row]
    numbers = uniform(seed, sequence_ids, column, stream=STREAM_TEACHER_TOKEN + round_index)
    drawn = torch.zeros(len(row), dtype=torch.int64, device=device)

    def draw(chunk: slice, logits: torch.Tensor) -> None:
        drawn[chunk] = draw_tokens(logits, shard, numbers[chunk])

    with teacher_head() as (weight, bias):
        student = Head(_together(student_hidden, student_head[0]), *student_head)
        teacher = Head(_together(teacher_hidden, weight), weight, bias)
        kl, top1 = token_kl(student, teacher, shard, backend=backend, visit=draw if sample_teacher else None)
    kl_map = torch.zeros(mask.shape, dtype=kl.dtype, device=device)
    token_map = torch.zeros(mask.shape, dtype=torch.int64, device=device)
    kl_map[mask], token_map[mask] = kl, drawn if sample_teacher else top1
    return TeacherScores(kl_map, token_map, mask)


def _together(parts: Sequence[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """[n, H], also where there is nothing."""
    found = [part for part in parts if len(part)]
    return torch.cat(found) if found else weight.new_zeros(0, weight.shape[1])
