"""A model that only reads and writes: one plain process, or partitioned over the ranks of a launcher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megadistill.decoding.decoder import PlanDecoder
from megadistill.decoding.hf_decoder import HFDecoder, make_decoder
from megadistill.models.loading import load_model, whole_model
from megadistill.parallel.context import ParallelContext
from megadistill.parallel.vocab import VocabShard


@contextmanager
def open_model(
    path: str,
    context: ParallelContext,
    *,
    vocab_size: int,
    dtype: str = "fp32",
    zero_stage: int = 0,
    attention: str = "sdpa",
    seed: int = 0,
    where: str = "model",
) -> Iterator[PlanDecoder | HFDecoder]:
    """A Decoder with ``read`` and ``head`` for scoring. DeepSpeed is imported only where there are several ranks."""
    loaded = load_model(path, dtype=dtype, vocab_size=vocab_size, seed=seed, attention=attention, where=where)
    if context.world_size == 1:
        model = whole_model(loaded).to(context.device).eval().requires_grad_(False)
        shard = VocabShard(0, vocab_size, vocab_size, None)
        yield make_decoder(model, loaded.family.plan(model), shard, context.device)
        return
    from megadistill.engines.teacher import frozen_model

    with frozen_model(loaded, context, zero_stage=zero_stage, dtype=dtype).decoder() as writer:
        yield writer
