"""A decoder that runs a model's own forward pass: for models that have no plan.

Shapes: B examples, in ``decode`` those still being written; S columns, H hidden size, Vs this rank's slice of the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megadistill.data.collate import left_padded, right_padded
from megadistill.decoding.decoder import PlanDecoder
from megadistill.decoding.hf_cache import cache_over
from megadistill.decoding.kv_cache import KVCache, PrefillChunk
from megadistill.decoding.linear import Logits
from megadistill.decoding.plan import DecoderPlan, key_value_shape
from megadistill.decoding.products import PACKED, Layout, ProductLayouts
from megadistill.decoding.sampling import Drawer
from megadistill.decoding.static_step import stepping_on
from megadistill.decoding.token_steps import EagerSteps, Stepping, TokenSteps
from megadistill.parallel.output_head import LogitMap, OutputHead
from megadistill.parallel.vocab import VocabShard

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_decoder(
    model: PreTrainedModel,
    plan: DecoderPlan | None,
    shard: VocabShard,
    device: torch.device,
    layouts: ProductLayouts = PACKED,
    stepping: Stepping | None = None,
) -> PlanDecoder | HFDecoder:
    """The project's decoder where the model has a plan, else one that runs the model's own forward pass.

    Args:
        model: A model whose parameters are all present.
        plan: How the project's decoder reads it.
        shard: This rank's slice of the vocabulary.
        device: Where the cache is made.
        layouts: Of the weights; a model without a plan has only the head's.
        stepping: How tokens are written; default: as is fast on the device.
    """
    head = OutputHead.of(model.get_output_embeddings(), shard, LogitMap.of(model.config))
    if plan is None:
        return HFDecoder(model, device, head, layouts.head, stepping)
    return PlanDecoder(plan, device, head, layouts, stepping)


class HFDecoder:
    """Implements ``decoding.protocols.Decoder`` over a transformers model whose parameters are present.

    It writes into the same preallocated cache as the project's own decoder. The model's own tensor-parallel reductions
    are its only communication.

    Args:
        model: The model.
        device: Where the cache is made.
        head: The output head, whose shard is this rank's slice of the vocabulary.
        layout: Of the head's weight.
        stepping: How tokens are written, of which only the interval matters; default: as is fast on the device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device,
        head: OutputHead,
        layout: Layout = "packed",
        stepping: Stepping | None = None,
    ) -> None:
        self.model, self.shard, self.device, self.head = model, head.shard, device, head
        self._logits = Logits(head.weight, head.bias, layout, head.logit_map)
        self._interval = (stepping or stepping_on(device)).interval

    def new_state(self, offsets: Sequence[int], columns: int) -> KVCache:
        """An empty cache of ``columns`` columns for examples whose first columns are ``offsets``."""
        config = self.model.config
        num_heads, head_dim = key_value_shape(config)
        shape = (num_heads // self.shard.tp_size, columns, head_dim)
        return KVCache(config.num_hidden_layers, offsets, shape, self.model.dtype, self.device)

    def prefill(self, state: KVCache, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Reads the prompts of slots 0, 1, ... into the cache; returns the hidden state [B, H] of each last token."""
        batch = left_padded(prompts, 0).to(self.device)
        return self._forward(batch.input_ids, state, 0, batch.position_ids)[:, -1]

    def decode(self, state: KVCache, tokens: Tensor, column: int) -> Tensor:
        """Reads one token [B] into ``column`` of each of the first B slots; returns their hidden states [B, H]."""
        starts = state.starts()
        positions = torch.full_like(tokens, column) if starts is None else column - starts[: len(tokens)]
        return self._forward(tokens[:, None], state, column, positions[:, None])[:, -1]

    def steps(self, state: KVCache, drawer: Drawer, *, keep_hidden: bool) -> TokenSteps:
        """What writes tokens into a cache of this decoder's."""
        return EagerSteps(self, state, drawer, keep_hidden=keep_hidden, interval=self._interval)

    @torch.no_grad()
    def _forward(self, tokens: Tensor, state: KVCache, column: int, positions: Tensor) -> Tensor:
        """Hidden states [B, S, H] of tokens [B, S] that go into the columns from ``column`` on."""
        num_examples, end = len(tokens), column + tokens.shape[1]
        states: Tensor = self.model.base_model(
            input_ids=tokens,
            attention_mask=(~state.padding()[:num_examples, :end]).long(),
            position_ids=positions,
            past_key_values=cache_over(state.layers, num_examples, column),
            use_cache=True,
        ).last_hidden_state
        return states

    @torch.no_grad()
    def read(self, chunks: Sequence[PrefillChunk]) -> list[Tensor]:
        """Hidden states [number of tokens, H] of whole examples, in one forward pass."""
        assert all(chunk.column == 0 for chunk in chunks)
        batch = right_padded([(chunk.tokens, None) for chunk in chunks], 0).to(self.device)
        states = self.model.base_model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state
        return [hidden[: len(chunk.tokens)] for hidden, chunk in zip(states, chunks, strict=True)]

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """This rank's logits [B, Vs] of hidden states [B, H]; float32 or better."""
        return self._logits(hidden)
