"""Decoding: prompts in, responses out, the same tokens on every layout; and continuing after a correction.

All examples of a decode batch end their prompts in one column, so response position p is column ``width + p`` for all
of them. Active examples, those that are being written, occupy the first slots of the cache: one that ends swaps places
with the last active one, one that joins with the first inactive one. So nothing is scattered, no example needs a
separate position, and the cache of finished examples stays for the correction (SCRG): sorted by error position,
examples join the decoding when it reaches theirs.

A random number depends on (seed, sequence id, response position, stream) only, never on the batch that an example
happens to be in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch

from megadistill.data.sample import Sample, TokenIds
from megadistill.decoding.nonfinite import OnNonFinite, logits_error
from megadistill.decoding.protocols import Decoder
from megadistill.decoding.sampling import NO_TOKEN, Drawer, Sampling, sampling_numbers
from megadistill.decoding.token_steps import Written

MAX_EXAMPLES = 64


class Correction(NamedTuple):
    """The teacher's token for one response position of an example (its index in the decode batch)."""

    example: int
    position: int
    token: int


class RolloutState:
    """One decode batch while it is written: responses, the kept cache, and the hidden states that made each token.

    Args:
        model: Writes the tokens.
        samples: The examples; only their sequence ids and prompts are looked at.
        limits: The most tokens that each response may have; a token of ``eos_ids`` (kept) ends it earlier.
        sampling: How tokens are drawn.
        keep_hidden: Keep the hidden states, for ``hidden``.
        drawer: What draws the tokens; default: a ``Drawer`` of ``sampling``.

    Attributes:
        nonfinite: Example -> response position of its first token whose logits were not finite, the same on every
            tensor-parallel rank. Its response ends there, with class 0 in that token's place.
    """

    def __init__(
        self,
        model: Decoder,
        samples: Sequence[Sample],
        *,
        limits: Sequence[int],
        eos_ids: frozenset[int],
        sampling: Sampling,
        keep_hidden: bool = False,
        drawer: Drawer | None = None,
    ) -> None:
        self._model, self._limits, self._eos, self._sampling = model, list(limits), eos_ids, sampling
        self._sequence_ids = [sample.sequence_id for sample in samples]
        self._prompts = [sample.prompt_ids for sample in samples]
        self._width, self._longest = max(map(len, self._prompts)), max(0, *limits)
        offsets = [self._width - len(prompt) for prompt in self._prompts]
        self._cache = model.new_state(offsets, self._width + self._longest)
        self._drawer = drawer or Drawer(model.shard, sampling, len(samples))
        self._steps = model.steps(self._cache, self._drawer, keep_hidden=keep_hidden)
        self._example_of = list(range(len(samples)))  # slot -> example
        self._tokens = torch.zeros(len(samples), self._longest, dtype=torch.int64, device=model.device)  # by example
        self._lengths = [0] * len(samples)
        self.nonfinite: dict[int, int] = {}
        self._not_finite: set[int] = set()  # examples whose columns may hold NaN, be it behind their ends
        self._keep_hidden = keep_hidden
        self._hidden: torch.Tensor | None = None

    def responses(self) -> list[TokenIds]:
        """Response ids that have been written so far, example by example (waits for the device once)."""
        rows = (self._tokens.clamp_min(0) if self.nonfinite else self._tokens).tolist()
        return [tuple(row[:length]) for row, length in zip(rows, self._lengths, strict=True)]

    def hidden(self, example: int, start: int = 0) -> torch.Tensor:
        """Hidden states [length - start, H] that predict the response from position ``start`` on.

        Only where the state was made with ``keep_hidden``.
        """
        assert self._hidden is not None, "made without keep_hidden"
        return self._hidden[example, start : self._lengths[example]]

    def write(self, stream: int) -> None:
        """Reads the prompts and writes every response to its end. ``stream`` names the random numbers."""
        hidden = self._model.prefill(self._cache, self._prompts)
        num_active = len(self._prompts)
        if self._keep_hidden:
            self._hidden = hidden.new_zeros(num_active, self._longest, hidden.shape[1])
        for slot in reversed(range(num_active)):  # from the end: a swap moves no slot that is still to be looked at
            if self._limits[self._example_of[slot]] < 1:
                num_active = self._leave(slot, num_active)
        numbers = self._numbers(stream)
        if num_active:
            active = torch.tensor(self._example_of[:num_active], device=self._model.device)
            hidden = hidden[active]
            first = None if numbers is None else numbers[0].index_select(0, active)
            tokens = self._drawer(self._model.logits(hidden), first)
            written = Written(tokens.unsqueeze(0), hidden.unsqueeze(0))
            num_active = self._append(written, active, num_active, 0)
            self._decode(num_active, [], 0, numbers)

    def rewrite(
        self, corrections: Sequence[Correction], stream: int, teacher_eos_ids: Collection[int] = frozenset()
    ) -> None:
        """Puts the teacher's tokens in and continues every corrected response from there.

        What lies left of a correction is neither read nor written again.

        Args:
            corrections: The teacher's tokens; one that ends a response, in the teacher's text or in the student's, is
                the last of its response.
            stream: Names the random numbers.
            teacher_eos_ids: Tokens that end a response of the teacher.
        """
        ends = self._eos.union(teacher_eos_ids)
        waiting = []
        for example, position, token in corrections:
            assert 0 <= position < self._lengths[example], "a correction outside its response"
            self._tokens[example, position] = token
            self._lengths[example] = position + 1
            if token not in ends and position + 1 < self._limits[example]:
                waiting.append((position, example))
        if not waiting:
            return
        waiting.sort()
        joining = [example for _, example in waiting]
        slot_of = {example: slot for slot, example in enumerate(self._example_of)}
        order, is_joining = [slot_of[example] for example in joining], set(joining)
        order += [slot for slot, example in enumerate(self._example_of) if example not in is_joining]
        self._cache.sort(order)
        self._example_of = [self._example_of[slot] for slot in order]
        for slot, (position, example) in enumerate(waiting):
            if example in self._not_finite:
                self._steps.forget(slot, self._width + position)
        self._decode(0, waiting, waiting[0][0], self._numbers(stream))

    def _decode(
        self, num_active: int, waiting: list[tuple[int, int]], position: int, numbers: torch.Tensor | None
    ) -> None:
        """Decodes until every response has ended, from ``position`` on, whose tokens are known.

        ``waiting``: (position, example) of those that join later, sorted, as their slots are. Slots at any time:

            0 ...  active  ... | num_active ... ended ... | next_slot ...  waiting, by position  ... | ... the others
                               ^ one that ends moves here; one that joins moves here from next_slot

        num_active <= next_slot: a joining example swaps places with an ended one, or is in its place already.
        """
        next_slot, waiting = num_active, waiting[::-1]  # reversed: the next one to join is popped
        active: torch.Tensor | None = None
        while num_active or waiting:
            if not num_active:
                position = waiting[-1][0]
            while waiting and waiting[-1][0] == position:
                _, example = waiting.pop()
                assert self._example_of[next_slot] == example
                self._swap(next_slot, num_active)
                num_active, next_slot, active = num_active + 1, next_slot + 1, None
            if active is None:
                active = torch.tensor(self._example_of[:num_active], device=self._model.device)
            # None may be written behind all limits, nor where the next one joins.
            longest = max(self._limits[example] for example in self._example_of[:num_active]) - 1
            end = min(position + self._steps.interval, longest, *(place for place, _ in waiting[-1:]))
            tokens = self._tokens[:, position].index_select(0, active)
            drawn_with = None if numbers is None else numbers[position + 1 : end + 1].index_select(1, active)
            written = self._steps.run(tokens, self._width + position, drawn_with, end - position)
            num_left = self._append(written, active, num_active, position + 1)
            position = end
            if num_left != num_active:
                num_active, active = num_left, None

    def _append(self, written: Written, active: torch.Tensor, num_active: int, position: int) -> int:
        """Keeps what was written from ``position`` on for every active example [A], up to its end.

        Examples that end leave the first slots. Returns how many stay active.
        """
        columns = slice(position, position + len(written.tokens))
        self._tokens[:, columns].index_copy_(0, active, written.tokens.T)
        if self._hidden is not None and written.hidden is not None:
            self._hidden[:, columns].index_copy_(0, active, written.hidden.transpose(0, 1))
        ended = [slot for slot, row in enumerate(written.tokens.T.tolist()) if self._has_ended(slot, row, position)]
        if len(ended) == num_active:  # no one is left to swap places with
            return 0
        for slot in reversed(ended):
            num_active = self._leave(slot, num_active)
        return num_active

    def _has_ended(self, slot: int, row: list[int], position: int) -> bool:
        """Whether tokens from ``position`` on, which make the response of a slot longer, end it."""
        example = self._example_of[slot]
        if NO_TOKEN in row:  # behind an end, too
            self._not_finite.add(example)
        for place, token in enumerate(row, start=position):
            self._lengths[example] = place + 1
            if token == NO_TOKEN:
                self.nonfinite.setdefault(example, place)
            if token == NO_TOKEN or token in self._eos or place + 1 >= self._limits[example]:
                return True
        return False

    def _leave(self, slot: int, num_active: int) -> int:
        self._swap(slot, num_active - 1)
        return num_active - 1

    def _swap(self, a: int, b: int) -> None:
        self._cache.swap(a, b)
        self._example_of[a], self._example_of[b] = self._example_of[b], self._example_of[a]

    def _numbers(self, stream: int) -> torch.Tensor | None:
        """Random numbers [N, B] of all N response positions, drawn at once; None for greedy decoding."""
        if self._drawer.is_greedy:
            return None
        num_examples = len(self._sequence_ids)
        ids = torch.tensor(self._sequence_ids, device=self._model.device).repeat_interleave(self._longest)
        positions = torch.arange(self._longest, device=ids.device).repeat(num_examples)
        numbers = sampling_numbers(self._sampling.seed, ids, positions, stream=stream)
        return numbers.view(num_examples, self._longest).T.contiguous()


def rollout(
    model: Decoder,
    samples: Sequence[Sample],
    *,
    limits: Sequence[int],
    eos_ids: frozenset[int],
    sampling: Sampling,
    stream: int = 0,
    max_examples: int = MAX_EXAMPLES,
    progress: Callable[[int], None] | None = None,
    on_nonfinite: OnNonFinite | None = None,
) -> list[TokenIds]:
    """Writes a response to every prompt, up to a token of ``eos_ids`` (kept) or ``limits[i]`` tokens.

    Communicates over the tensor-parallel group only: data-parallel ranks may hold different numbers of examples and
    columns.

    Args:
        model: Writes the tokens.
        samples: The examples; only their sequence ids and prompts are looked at.
        limits: The most tokens of each response.
        eos_ids: Tokens that end a response.
        sampling: How tokens are drawn.
        stream: Names the random numbers.
        max_examples: The most examples that are written at a time.
        progress: Called with the number of examples that have just been finished.
        on_nonfinite: Called with (index in ``samples``, response position) where logits are not finite; the response
            ends there. Default: that raises.

    Returns:
        The responses in the order of ``samples``.

    Raises:
        DivergenceError: Logits are not finite, and there is no ``on_nonfinite``.
    """
    # Prompts of similar length together: less padding.
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].prompt_ids))
    responses: list[TokenIds] = [()] * len(samples)
    for start in range(0, len(order), max_examples):
        batch = order[start : start + max_examples]
        state = RolloutState(
            model, [samples[i] for i in batch], limits=[limits[i] for i in batch], eos_ids=eos_ids, sampling=sampling
        )
        state.write(stream)
        for i, response in zip(batch, state.responses(), strict=True):
            responses[i] = response
        for i, position in sorted((batch[example], position) for example, position in state.nonfinite.items()):
            if on_nonfinite is None:
                raise logits_error(f"sequence {samples[i].sequence_id}", position)
            on_nonfinite(i, position)
        if progress is not None:
            progress(len(batch))
    return responses
