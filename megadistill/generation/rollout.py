"""Decoding: prompts in, responses out, the same tokens on every layout.

A random number depends on (seed, sequence id, response position, stream) only, never on the batch a row happens to be
in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megadistill.data.collate import left_padded
from megadistill.generation.protocols import Rows, Sampling, StepModel
from megadistill.generation.sampling import sample_tokens

MAX_ROWS = 64


def rollout(
    model: StepModel,
    rows: Rows,
    *,
    limits: Sequence[int],
    eos_ids: frozenset[int],
    pad_id: int,
    sampling: Sampling,
    stream: int = 0,
    max_rows: int = MAX_ROWS,
    progress: Callable[[int], None] | None = None,
) -> Rows:
    """Continues every row until EOS (kept) or until its response has ``limits[row]`` tokens.

    The responses in ``rows`` are prefixes that stay; a row whose prefix has ended is returned as it is. ``stream``
    separates the random numbers of several continuations of one row. ``progress`` is called with the number of
    finished rows. Communicates over the tensor-parallel group only: data-parallel ranks may hold different numbers of
    rows and columns.
    """
    responses = [list(response) for response in rows.responses]
    todo = [
        i
        for i, response in enumerate(responses)
        if len(response) < limits[i] and not (response and response[-1] in eos_ids)
    ]
    for start in range(0, len(todo), max_rows):
        part = todo[start : start + max_rows]
        _decode(model, rows, responses, part, limits, eos_ids, pad_id, sampling, stream)
        if progress is not None:
            progress(len(part))
    return rows.with_responses(responses)


def _decode(
    model: StepModel,
    rows: Rows,
    responses: list[list[int]],
    part: list[int],
    limits: Sequence[int],
    eos_ids: frozenset[int],
    pad_id: int,
    sampling: Sampling,
    stream: int,
) -> None:
    """Decodes the rows ``part`` together, appending to ``responses``; finished rows leave the batch."""
    batch = left_padded([[*rows.prompts[i], *responses[i]] for i in part], pad_id).to(model.device)
    state, logits = model.prefill(batch.input_ids, batch.attention_mask)
    active = list(part)
    while True:
        tokens = sample_tokens(
            logits,
            model.shard,
            seed=sampling.seed,
            sequence_ids=torch.tensor([rows.sequence_ids[i] for i in active], device=model.device),
            positions=torch.tensor([len(responses[i]) for i in active], device=model.device),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            stream=stream,
        )
        keep = []
        for column, (row, token) in enumerate(zip(active, tokens.tolist(), strict=True)):
            responses[row].append(token)
            if token not in eos_ids and len(responses[row]) < limits[row]:
                keep.append(column)
        if not keep:
            return
        if len(keep) < len(active):
            kept = torch.tensor(keep, device=model.device)
            model.select(state, kept)
            tokens, active = tokens[kept], [active[column] for column in keep]
        logits = model.decode(state, tokens)
