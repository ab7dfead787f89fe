"""The teacher's hidden states of given responses, read once and kept up to date while responses are corrected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megadistill.data.sample import Sample, TokenIds
from megadistill.decoding.kv_cache import PrefillChunk
from megadistill.decoding.protocols import Prefiller, TextModel


class TeacherStates:
    """Hidden states of a decode batch.

    A correction changes the end of a response only. With a prefiller that keeps its cache nothing is read twice;
    otherwise changed responses are read again from the start (all of them, by a prefiller that cannot keep a cache).

    Args:
        prefiller: Reads the text.
        prompts: Prompts of the examples.
        max_columns: Longest prompt plus response, for the cache.
        keep_cache: Keep keys and values between updates, where the prefiller can.

    Attributes:
        hidden: For each example [length of its response, H_T], which predict its tokens; None before it is read.
    """

    def __init__(
        self, prefiller: Prefiller, prompts: Sequence[TokenIds], max_columns: int = 0, *, keep_cache: bool = False
    ) -> None:
        self._prefiller, self._prompts = prefiller, prompts
        keeps = keep_cache and prefiller.keeps_cache
        self._cache = prefiller.new_state([0] * len(prompts), max_columns) if keeps else None
        self.hidden: list[torch.Tensor | None] = [None] * len(prompts)

    def hidden_from(self, example: int, start: int) -> torch.Tensor:
        """Hidden states [length - start, H_T] of a response that has been read, from position ``start`` on."""
        states = self.hidden[example]
        assert states is not None, "the response has not been read"
        return states[start:]

    def update(self, responses: Sequence[TokenIds], starts: Sequence[int]) -> None:
        """Reads what is new, in one call of the prefiller.

        Args:
            responses: Response ids of each example.
            starts: The states that predict ``responses[i]`` from position ``starts[i]`` on are not known yet.
        """
        chunks, places = [], []
        for i, (prompt, response, start) in enumerate(zip(self._prompts, responses, starts, strict=True)):
            if not self._prefiller.keeps_cache:
                # Such a prefiller makes one forward pass for every few examples, so all examples are read;
                # otherwise ranks would differ in the number of passes.
                start = 0
            elif start >= len(response):
                kept = self.hidden[i]
                self.hidden[i] = None if kept is None else kept[: len(response)]
                continue
            if start and self._cache is not None:
                first, tokens = len(prompt) + start - 1, response[start - 1 : -1]
            else:
                start, first, tokens = 0, 0, (*prompt, *response[:-1])
            chunks.append(PrefillChunk(i, first, tokens))
            places.append((i, start, len(response)))
        states = self._prefiller.read(chunks, self._cache)
        for (i, start, length), read in zip(places, states, strict=True):
            kept = self.hidden[i]
            new = read[len(read) - (length - start) :]
            self.hidden[i] = new if start == 0 or kept is None else torch.cat([kept[:start], new])


def with_teacher_states(samples: Sequence[Sample], teacher: TextModel | None, examples_per_pass: int) -> list[Sample]:
    """The samples with the teacher's hidden states of their responses; unchanged without a teacher.

    One call of the prefiller, which communicates in the same way on all ranks, whatever has a response.

    Args:
        samples: The samples.
        teacher: The teacher, or None.
        examples_per_pass: Examples of a forward pass of a teacher without a decoder plan.
    """
    if teacher is None:
        return list(samples)
    return [
        sample if sample.response_ids is None else replace(sample, teacher_hidden=hidden)
        for sample, hidden in zip(samples, states_of(samples, teacher, examples_per_pass), strict=True)
    ]


def states_of(samples: Sequence[Sample], model: TextModel, examples_per_pass: int) -> list[torch.Tensor | None]:
    """A model's hidden states [length, H] that predict each sample's response, in one call of its prefiller."""
    states = TeacherStates(model.prefiller(examples_per_pass), [sample.prompt_ids for sample in samples])
    states.update([sample.response_ids or () for sample in samples], [0] * len(samples))
    return states.hidden
