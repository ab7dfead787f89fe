"""A decoder as generation sees it: prefill, decode, score. One implementation over any transformers decoder and its
cache.

Shapes: B rows, P prompt columns (left-padded), S columns, H hidden size, Vs this rank's slice of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from megadistill.models.loading import new_cache
from megadistill.parallel.vocab import VocabShard


@dataclass
class DecodeState:
    """Key-value cache (this rank's heads), attention mask [B, columns so far] and next position [B] of the active
    rows."""

    cache: Any
    attention_mask: torch.Tensor
    next_position: torch.Tensor


class HFStepModel:
    """Implements ``generation.protocols.StepModel`` over a transformers model whose parameters are present.

    The model's own tensor-parallel reductions are its only communication: two all-reduces a layer and column.
    """

    def __init__(self, model: nn.Module, shard: VocabShard, device: torch.device) -> None:
        self.model, self.shard, self.device = model, shard, device

    @property
    def head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """This rank's head shard: weight [Vs, H] and bias [Vs] or None."""
        head = self.model.get_output_embeddings()
        return head.weight, getattr(head, "bias", None)

    @torch.no_grad()
    def prefill(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[DecodeState, torch.Tensor]:
        """Reads left-padded prompts [B, P]; returns the state and the local logits [B, Vs] of the next token."""
        position_ids = positions_of(attention_mask)
        output = self.model.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=new_cache(),
            use_cache=True,
        )
        state = DecodeState(output.past_key_values, attention_mask, position_ids[:, -1] + 1)
        return state, self._logits(output.last_hidden_state[:, -1])

    @torch.no_grad()
    def decode(self, state: DecodeState, tokens: torch.Tensor) -> torch.Tensor:
        """Appends one token a row [B] and returns the local logits [B, Vs] of the next one; updates ``state``."""
        state.attention_mask = F.pad(state.attention_mask, (0, 1), value=1)
        output = self.model.base_model(
            input_ids=tokens[:, None],
            attention_mask=state.attention_mask,
            position_ids=state.next_position[:, None],
            past_key_values=state.cache,
            use_cache=True,
        )
        state.next_position = state.next_position + 1
        return self._logits(output.last_hidden_state[:, -1])

    def select(self, state: DecodeState, rows: torch.Tensor) -> None:
        """Keeps only ``rows`` (int64 indices) of the state: finished rows leave the batch."""
        state.cache.batch_select_indices(rows)
        state.attention_mask = state.attention_mask[rows]
        state.next_position = state.next_position[rows]

    @torch.no_grad()
    def hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, S, H] of whole (right-padded) sequences, for scoring."""
        return self.model.base_model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        # float32 before the product: bf16 logits would bias what is sampled (facts: up to 1 % of a KL).
        weight, bias = self.head
        logits = F.linear(hidden.float(), weight.float()) if hidden.dtype != torch.float64 else F.linear(hidden, weight)
        return logits if bias is None else logits + bias


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids [B, S] that count real tokens only, 0 in the padding before them."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
