"""A decoder as generation sees it, over the family's own forward pass: for models that have no plan.

Shapes: B rows, k active rows, S columns, H hidden size, Vs this rank's slice of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megadistill.data.collate import left_padded, right_padded
from megadistill.decoding.decoder import PlanDecoder
from megadistill.decoding.hf_cache import cache_over
from megadistill.decoding.kv_cache import KVCache, PrefillChunk
from megadistill.decoding.linear import Logits
from megadistill.decoding.plan import DecoderPlan, key_value_shape
from megadistill.parallel.output_head import OutputHead
from megadistill.parallel.vocab import VocabShard


def make_decoder(
    model: nn.Module, plan: DecoderPlan | None, shard: VocabShard, device: torch.device
) -> PlanDecoder | HFDecoder:
    """The project's decoder where the model has a plan, else its own forward; all parameters must be present."""
    head = OutputHead.of(model.get_output_embeddings(), shard)
    return HFDecoder(model, device, head) if plan is None else PlanDecoder(plan, device, head)


class HFDecoder:
    """Implements ``generation.protocols.Decoder`` over a transformers model whose parameters are present.

    It writes into the same preallocated cache as the project's own decoder. The model's own tensor-parallel reductions
    are its only communication.
    """

    def __init__(self, model: nn.Module, device: torch.device, head: OutputHead) -> None:
        self.model, self.shard, self.device, self.head = model, head.shard, device, head
        self._logits = Logits(head.weight, head.bias)

    def new_state(self, offsets: Sequence[int], columns: int) -> KVCache:
        """An empty cache for rows whose first columns are ``offsets``."""
        config = self.model.config
        heads, head_dim = key_value_shape(config)
        shape = (heads // self.shard.tp_size, columns, head_dim)
        return KVCache(config.num_hidden_layers, offsets, shape, self.model.dtype, self.device)

    def prefill(self, state: KVCache, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Reads the prompts of slots 0, 1, ... into the cache; returns the hidden state [B, H] of each last token."""
        batch = left_padded(prompts, 0).to(self.device)
        return self._forward(batch.input_ids, state, 0, batch.position_ids)[:, -1]

    def decode(self, state: KVCache, tokens: Tensor, column: int) -> Tensor:
        """Reads one token [k] into ``column`` of the first k slots; returns their hidden states [k, H]."""
        starts = state.starts()
        positions = torch.full_like(tokens, column) if starts is None else column - starts[: len(tokens)]
        return self._forward(tokens[:, None], state, column, positions[:, None])[:, -1]

    @torch.no_grad()
    def _forward(self, tokens: Tensor, state: KVCache, column: int, positions: Tensor) -> Tensor:
        rows, end = len(tokens), column + tokens.shape[1]
        return self.model.base_model(
            input_ids=tokens,
            attention_mask=(~state.padding()[:rows, :end]).long(),
            position_ids=positions,
            past_key_values=cache_over(state.layers, rows, column),
            use_cache=True,
        ).last_hidden_state

    @torch.no_grad()
    def read(self, readings: Sequence[PrefillChunk]) -> list[Tensor]:
        """Hidden states [number of tokens, H] of whole rows, in one forward pass."""
        assert all(reading.column == 0 for reading in readings)
        batch = right_padded([(reading.tokens, None) for reading in readings], 0).to(self.device)
        states = self.model.base_model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state
        return [row[: len(reading.tokens)] for row, reading in zip(states, readings, strict=True)]

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """This rank's logits [k, Vs] of hidden states [k, H]; float32 or better."""
        return self._logits(hidden)
