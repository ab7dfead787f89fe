"""One response, token by token, for somebody who watches it being written."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megadistill.data.sample import Sample
from megadistill.decoding.nonfinite import logits_error
from megadistill.decoding.protocols import Decoder
from megadistill.decoding.sampling import NO_TOKEN, Drawer, Sampling, sampling_numbers


@torch.no_grad()
def stream_tokens(
    model: Decoder, sample: Sample, *, limit: int, eos_ids: frozenset[int], sampling: Sampling, stream: int = 0
) -> Iterator[int]:
    """The tokens that ``rollout`` writes for the same arguments, each as soon as it is known.

    Communicates over the tensor-parallel group: every rank of it must read the iterator to the same token.

    Args:
        model: Writes the tokens.
        sample: Only its sequence id and its prompt are looked at.
        limit: The most tokens.
        eos_ids: Tokens that end a response; the one that does is the last.
        sampling: How tokens are drawn.
        stream: Names the random numbers.

    Raises:
        DivergenceError: Logits are not finite.
    """
    width = len(sample.prompt_ids)
    state, drawer = model.new_state([0], width + limit), Drawer(model.shard, sampling, 1)
    steps = model.steps(state, drawer, keep_hidden=False)
    numbers = None
    if not drawer.is_greedy:
        ids = torch.full((limit,), sample.sequence_id, device=model.device)
        places = torch.arange(limit, device=model.device)
        numbers = sampling_numbers(sampling.seed, ids, places, stream=stream).view(limit, 1)
    hidden = model.prefill(state, [sample.prompt_ids])
    tokens = drawer(model.logits(hidden), None if numbers is None else numbers[0]).unsqueeze(0)
    position = 0
    while True:
        for token in tokens[:, 0].tolist():
            if token == NO_TOKEN:
                raise logits_error("the response", position)
            yield token
            position += 1
            if token in eos_ids or position >= limit:
                return
        count = min(steps.interval, limit - position)
        drawn_with = None if numbers is None else numbers[position : position + count]
        tokens = steps.run(tokens[-1].clone(), width + position - 1, drawn_with, count).tokens
