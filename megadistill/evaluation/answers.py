"""Answers and likelihoods of a model, computed by all ranks: data-parallel ranks share the rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from megadistill.config.sampling import SamplingOptions
from megadistill.data.encode import TokenizedExample
from megadistill.data.sample import Sample
from megadistill.data.tokenize import decode_responses, response_limit
from megadistill.decoding.kv_cache import PrefillChunk
from megadistill.decoding.nonfinite import FirstFault, logits_error, row_name
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

    Raises:
        DivergenceError: On every rank, where the logits of a row are not finite.
    """
    fault = FirstFault(context.dp_size)
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
        on_nonfinite=lambda i, position: fault.add(logits_error(row_name(rows[mine[i]]), position)),
    )
    texts = decode_responses(settings.tokenizer, [cut_end(ids, settings.eos_ids) for ids in written])
    answers = [""] * len(rows)
    for indices, texts_of_rank, error in context.gather_objects_over_dp((mine, texts, fault.error)):
        if error is not None:
            raise error
        for index, text in zip(indices, texts_of_rank, strict=True):
            answers[index] = text
    return answers


@torch.no_grad()
def reference_likelihood(
    model: Any,
    rows: Sequence[TokenizedExample],
    settings: AnswerSettings,
    context: ParallelContext,
    progress: Callable[[int], None] | None = None,
) -> LikelihoodTotal:
    """Negative log-likelihood, in nats, of the first reference of every row (EOS included), on every rank.

    Communicates over the tensor-parallel group, and gathers totals once over the data-parallel group.

    Args:
        model: A Decoder that also has ``read`` and ``head``.
        rows: The prompts and references.
        settings: Tokenizer and batch size.
        context: Ranks and groups.
        progress: Called with numbers of finished rows.

    Raises:
        DivergenceError: On every rank, where the logits of a row are not finite.
    """
    mine = [row for row in rows[context.dp_rank :: context.dp_size] if row.response_ids is not None]
    parts, fault = [], FirstFault(context.dp_size)
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
        nats = _nats(model, hidden, responses)
        if not math.isfinite(nats):
            broken = (row for row, *one in zip(batch, hidden, responses, strict=True) if not _is_finite(model, *one))
            fault.add(logits_error(row_name(next(broken, batch[0]))))
        parts.append(LikelihoodTotal(nats, sum(map(len, responses)), len(batch)))
        if progress is not None:
            progress(len(batch))
    gathered = context.gather_objects_over_dp((total_likelihood(parts), fault.error))
    for _, error in gathered:
        if error is not None:
            raise error
    return total_likelihood(total for total, _ in gathered)


def _nats(model: Any, hidden: Sequence[torch.Tensor], responses: Sequence[Sequence[int]]) -> float:
    """Negative log-likelihood of responses, the same on every tensor-parallel rank."""
    labels = torch.tensor([token for response in responses for token in response], device=model.device)
    return float(cross_entropy(Head.of(torch.cat(list(hidden)), model.head), labels, model.shard, num_tokens=1))


def _is_finite(model: Any, hidden: torch.Tensor, response: Sequence[int]) -> bool:
    return math.isfinite(_nats(model, [hidden], [response]))
