"""A model that is never trained: in one plain process, or partitioned over the ranks of a launcher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megadistill.decoding.decoder import PlanDecoder
from megadistill.decoding.hf_decoder import HFDecoder, make_decoder
from megadistill.decoding.layouts import choose_layouts, product_shapes
from megadistill.decoding.products import PACKED
from megadistill.decoding.static_step import stepping_on
from megadistill.models.loading import load_model_on_ranks, whole_model
from megadistill.models.weight_files import ReadMode
from megadistill.parallel.context import ParallelContext
from megadistill.parallel.node import Node
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
    read: ReadMode = "map",
    cuda_graphs: bool = True,
) -> Iterator[PlanDecoder | HFDecoder]:
    """A decoder with all parameters present, whose ``read`` and ``head`` serve for scoring.

    Collective over the world. DeepSpeed is imported only where there are several ranks.

    Args:
        path: A model folder, a configuration file, or a hub name.
        context: The grid of processes.
        vocab_size: Classes of the head that are used.
        dtype: A key of ``models.loading.DTYPES``.
        zero_stage: How several ranks partition the model.
        attention: Attention implementation of transformers.
        seed: Of random weights.
        where: The key or option that names the model; errors begin with it.
        read: How the weights are read.
        cuda_graphs: On GPUs, record decoding steps.

    Raises:
        ConfigError: The model cannot be loaded.
        CheckpointError: Files of a sharded model are missing or damaged.
    """
    node = Node.build(context, has_group=read == "copy")
    loaded = load_model_on_ranks(
        path, node, dtype=dtype, vocab_size=vocab_size, seed=seed, attention=attention, where=where, read=read
    )
    if context.world_size == 1:
        model = whole_model(loaded, context.device).requires_grad_(False)
        shard, plan = VocabShard(0, vocab_size, vocab_size, None), loaded.family.plan_or_say(model, context.rank)
        layouts = PACKED
        if context.device.type == "cpu":
            head = model.get_output_embeddings().weight
            layouts = choose_layouts("auto", product_shapes(plan, head, lambda weight: weight.shape), head.dtype)
        stepping = stepping_on(context.device, cuda_graphs=cuda_graphs)
        yield make_decoder(model, plan, shard, context.device, layouts, stepping)
        return
    from megadistill.engines.partitioned import frozen_model

    model_on_ranks = frozen_model(loaded, context, zero_stage=zero_stage, dtype=dtype, cuda_graphs=cuda_graphs)
    with model_on_ranks.decoder() as decoder:
        yield decoder
