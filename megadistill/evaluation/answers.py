"""Answers and likelihoods of a model, computed by all ranks: data-parallel ranks share the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from megadistill.config.sampling import SamplingOptions
from megadistill.data.encode import TokenizedExample
from megadistill.data.sample import Sample
from megadistill.data.tokenize import decode_responses, response_limit
from megadistill.decoding.kv_cache import PrefillChunk
from megadistill.decoding.protocols import Decoder
from megadistill.decoding.rollout import rollout
from megadistill.decoding.sampling import Sampling
from megadistill.evaluation.perplexity import LikelihoodTotal, total_likelihood
from megadistill.losses import Head, cross_entropy
from megadistill.models.end_tokens import cut_end
from megadistill.parallel.context import ParallelContext
from megadistill.parallel.rng import Stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are generated: end tokens, limits in tokens, sampling, rows at a time on a data-parallel rank."""

    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]
    max_new_tokens: int
    max_tokens: int
    temperature: float = 1.0
    options: SamplingOptions = SamplingOptions()
    batch_size: int = 16

    def limit(self, prompt: Sequence[int]) -> int:
        """Longest answer to a prompt; at least one token."""
        limit = response_limit(len(prompt), max_new_tokens=self.max_new_tokens, max_tokens=self.max_tokens)
        return max(1, limit)


def write_answers(
    model: Decoder,
    rows: Sequence[TokenizedExample],
    seed: int | None,
    settings: AnswerSettings,
    context: ParallelContext,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """The model's answers to ``rows``, which data-parallel ranks share.

    An answer depends only on (seed, row id). Communicates over the tensor-parallel group while decoding, and gathers
    texts once over the data-parallel group.

    Args:
        model: The model.
        rows: The prompts.
        seed: Seed of the sampled answers; None: greedy answers.
        settings: Limits and sampling.
        context: Ranks and groups.
        progress: Called with numbers of finished rows.

    Returns:
        One text per row, in order, on every rank.
    """
    mine = list(range(context.dp_rank, len(rows), context.dp_size))
    part = [Sample(rows[i].id, rows[i].prompt_ids) for i in mine]
    written = rollout(
        model,
        part,
        limits=[settings.limit(sample.prompt_ids) for sample in part],
        eos_ids=settings.eos_ids,
        sampling=Sampling(seed or 0, settings.temperature if seed is not None else 0.0, settings.options),
        stream=Stream.EVALUATION,
        max_examples=settings.batch_size,
        progress=progress,
    )
    texts = decode_responses(settings.tokenizer, [cut_end(ids, settings.eos_ids) for ids in written])
    answers = [""] * len(rows)
    for indices, texts_of_rank in context.gather_objects_over_dp((mine, texts)):
        for index, text in zip(indices, texts_of_rank, strict=True):
            answers[index] = text
    return answers


@torch.no_grad()
def reference_likelihood(
    model: Any, rows: Sequence[TokenizedExample], settings: AnswerSettings, context: ParallelContext
) -> LikelihoodTotal:
    """Negative log-likelihood, in nats, of the first reference of every row (EOS included), on every rank.

    Communicates over the tensor-parallel group, and gathers totals once over the data-parallel group.

    Args:
        model: A Decoder that also has ``read`` and ``head``.
        rows: The prompts and references.
        settings: Tokenizer and batch size.
        context: Ranks and groups.
    """
    mine = [row for row in rows[context.dp_rank :: context.dp_size] if row.response_ids is not None]
    parts = []
    for start in range(0, len(mine), settings.batch_size):
        batch = mine[start : start + settings.batch_size]
        responses = [row.response_ids or () for row in batch]
        chunks = [
            PrefillChunk(i, 0, (*row.prompt_ids, *response[:-1]))
            for i, (row, response) in enumerate(zip(batch, responses, strict=True))
        ]
        hidden = [
            states[len(states) - len(response) :]
            for states, response in zip(model.read(chunks), responses, strict=True)
        ]
        labels = torch.tensor([token for response in responses for token in response], device=model.device)
        nats = cross_entropy(Head.of(torch.cat(hidden), model.head), labels, model.shard, num_tokens=1)
        parts.append(LikelihoodTotal(float(nats), len(labels), len(batch)))
    local = total_likelihood(parts)
    return total_likelihood(context.gather_objects_over_dp(local))
