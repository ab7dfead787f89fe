"""Decoding: prompts in, responses out, the same tokens on every layout; and writing on after a correction.

All rows of a wave end their prompts in one column, so response position p is column ``width + p`` for all of them. Rows
that are being written are the first slots of the cache: a row that ends changes places with the last of them, a row
that joins with the first of the others. So there is no scatter and no position of its own for any row, and the cache of
ended rows stays for the correction (SCRG): sorted by error position, rows join the decoding when it reaches theirs.

A random number depends on (seed, sequence id, response position, stream) only, never on the batch a row happens to be
in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megadistill.decoding.protocols import Correction, Decoder, Rows, Sampling
from megadistill.decoding.sampling import draw_tokens
from megadistill.parallel.rng import uniform

MAX_ROWS = 64


class RolloutState:
    """One wave of rows while they are written: responses, the kept cache, and the hidden states that made each token.

    ``limits[row]`` is the most tokens its response may have; EOS (kept) ends it earlier.
    """

    def __init__(
        self,
        model: Decoder,
        rows: Rows,
        *,
        limits: Sequence[int],
        eos_ids: frozenset[int],
        sampling: Sampling,
        keep_hidden: bool = False,
    ) -> None:
        self._model, self._rows, self._limits, self._eos, self._sampling = model, rows, list(limits), eos_ids, sampling
        self._width, self._longest = max(map(len, rows.prompts)), max(0, *limits)
        offsets = [self._width - len(prompt) for prompt in rows.prompts]
        self._state = model.new_state(offsets, self._width + self._longest)
        self._row_of = list(range(len(rows)))  # slot -> row
        self._tokens = torch.zeros(len(rows), self._longest, dtype=torch.int64, device=model.device)  # by row
        self._lengths = [0] * len(rows)
        self._keep_hidden, self._hidden = keep_hidden, None

    @property
    def rows(self) -> Rows:
        """The rows with what has been written so far."""
        texts = self._tokens.tolist()
        return self._rows.with_responses([text[:n] for text, n in zip(texts, self._lengths, strict=True)])

    def hidden(self, row: int, start: int = 0) -> torch.Tensor:
        """Hidden states [length - start, H] that predict the row's tokens from ``start`` on."""
        assert self._hidden is not None, "made without keep_hidden"
        return self._hidden[row, start : self._lengths[row]]

    def write(self, stream: int) -> None:
        """Reads the prompts and writes every row to its end. ``stream`` names the random numbers."""
        hidden = self._model.prefill(self._state, self._rows.prompts)
        if self._keep_hidden:
            self._hidden = hidden.new_zeros(len(self._rows), self._longest, hidden.shape[1])
        num_active = len(self._rows)
        for slot in reversed(range(num_active)):
            if self._limits[self._row_of[slot]] < 1:
                num_active = self._leave(slot, num_active)
        numbers = self._numbers(stream)
        if num_active:
            active = torch.tensor(self._row_of[:num_active], device=self._model.device)
            num_active = self._append(hidden[active], active, num_active, 0, numbers)
            self._write_on(num_active, [], 0, numbers)

    def rewrite(self, corrections: Sequence[Correction], stream: int) -> None:
        """Puts the teacher's tokens in and writes every corrected row on from there, keeping what it read before."""
        waiting = []
        for row, position, token in corrections:
            assert 0 <= position < self._lengths[row], "a correction outside its response"
            self._tokens[row, position] = token
            self._lengths[row] = position + 1
            if token not in self._eos and position + 1 < self._limits[row]:
                waiting.append((position, row))
        if not waiting:
            return
        waiting.sort()
        joining = [row for _, row in waiting]
        slot_of = {row: slot for slot, row in enumerate(self._row_of)}
        order, is_joining = [slot_of[row] for row in joining], set(joining)
        order += [slot for slot, row in enumerate(self._row_of) if row not in is_joining]
        self._state.sort(order)
        self._row_of = [self._row_of[slot] for slot in order]
        self._write_on(0, waiting, waiting[0][0], self._numbers(stream))

    def _write_on(
        self, num_active: int, waiting: list[tuple[int, int]], position: int, numbers: torch.Tensor | None
    ) -> None:
        """Decodes from ``position`` on, whose tokens are known, until every row has ended.

        ``waiting``: (position, row) of the rows that join later, sorted; they wait in this order. Slots, at any time:

            0 ...  active  ... | num_active ... ended ... | next_slot ...  waiting, by position  ... | ... not concerned
                               ^ a row that ends leaves to here; one that joins comes from next_slot to here

        num_active <= next_slot: a joining row changes places with an ended one, or is in its place already.
        """
        next_slot, waiting = num_active, waiting[::-1]
        active: torch.Tensor | None = None
        while num_active or waiting:
            if not num_active:
                position = waiting[-1][0]
            while waiting and waiting[-1][0] == position:
                _, row = waiting.pop()
                assert self._row_of[next_slot] == row
                self._swap(next_slot, num_active)
                num_active, next_slot, active = num_active + 1, next_slot + 1, None
            if active is None:
                active = torch.tensor(self._row_of[:num_active], device=self._model.device)
            column = self._width + position
            hidden = self._model.decode(self._state, self._tokens[active, position], column)
            position += 1
            still = self._append(hidden, active, num_active, position, numbers)
            if still != num_active:
                num_active, active = still, None

    def _append(
        self, hidden: torch.Tensor, active: torch.Tensor, num_active: int, position: int, numbers: torch.Tensor | None
    ) -> int:
        """Draws the token at ``position`` of every active row; rows that end leave. Returns how many stay."""
        tokens = draw_tokens(
            self._model.logits(hidden),
            self._model.shard,
            None if numbers is None else numbers[active, position],
            temperature=self._sampling.temperature,
            top_k=self._sampling.top_k,
            top_p=self._sampling.top_p,
        )
        self._tokens[active, position] = tokens
        if self._hidden is not None:
            self._hidden[active, position] = hidden
        ended = []
        for slot, token in enumerate(tokens.tolist()):
            row = self._row_of[slot]
            self._lengths[row] = position + 1
            if token in self._eos or position + 1 >= self._limits[row]:
                ended.append(slot)
        if len(ended) == num_active:  # nobody is left whom a change of places would serve
            return 0
        for slot in reversed(ended):
            num_active = self._leave(slot, num_active)
        return num_active

    def _leave(self, slot: int, num_active: int) -> int:
        self._swap(slot, num_active - 1)
        return num_active - 1

    def _swap(self, a: int, b: int) -> None:
        self._state.swap(a, b)
        self._row_of[a], self._row_of[b] = self._row_of[b], self._row_of[a]

    def _numbers(self, stream: int) -> torch.Tensor | None:
        """Random numbers [B, N] of every position, drawn at once; greedy text needs none."""
        if self._sampling.temperature == 0:
            return None
        ids = torch.tensor(self._rows.sequence_ids, device=self._model.device).repeat_interleave(self._longest)
        positions = torch.arange(self._longest, device=ids.device).repeat(len(self._rows))
        return uniform(self._sampling.seed, ids, positions, stream=stream).view(len(self._rows), self._longest)


def rollout(
    model: Decoder,
    rows: Rows,
    *,
    limits: Sequence[int],
    eos_ids: frozenset[int],
    sampling: Sampling,
    stream: int = 0,
    max_rows: int = MAX_ROWS,
    progress: Callable[[int], None] | None = None,
) -> Rows:
    """Writes a response to every prompt, up to EOS (kept) or ``limits[row]`` tokens, ``max_rows`` rows at a time.

    ``progress`` is called with the number of finished rows. Communicates over the tensor-parallel group only:
    data-parallel ranks may hold different numbers of rows and columns.
    """
    # Prompts of like lengths together: less padding.
    order = sorted(range(len(rows)), key=lambda row: len(rows.prompts[row]))
    responses: list[tuple[int, ...]] = [()] * len(rows)
    for start in range(0, len(order), max_rows):
        part = order[start : start + max_rows]
        wave = Rows(
            tuple(rows.sequence_ids[row] for row in part), tuple(rows.prompts[row] for row in part), ((),) * len(part)
        )
        rollout_state = RolloutState(
            model, wave, limits=[limits[row] for row in part], eos_ids=eos_ids, sampling=sampling
        )
        rollout_state.write(stream)
        for row, response in zip(part, rollout_state.rows.responses, strict=True):
            responses[row] = response
        if progress is not None:
            progress(len(part))
    return rows.with_responses(responses)
