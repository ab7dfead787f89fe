"""The forward pass that all engines run: hidden states, and optionally a function that gets the head.

DeepSpeed calls the model's ``forward``; ZeRO-3 gathers a parameter while the forward of its module runs. A ``HeadFn``
needs the head's weight outside the head's own forward, so it is called inside the model's forward, where the weight
(registered as an external parameter) is present, once per batch. The model object itself is passed to DeepSpeed: its
names, configuration and tensor-parallel plan stay what AutoTP expects.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HeadFn = Callable[[torch.Tensor, nn.Module], Any]


def _forward(
    self: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
    head_fn: HeadFn | None = None,
    **sequences: Any,
) -> Any:
    """Hidden states [B, S, H] of the decoder, or what ``head_fn(hidden, output embeddings)`` makes of them.

    Without ``attention_mask``, ``sequences`` are the lengths and bounds that ``models.attention`` takes.
    """
    hidden = self.base_model(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False, **sequences
    ).last_hidden_state
    if head_fn is None:
        return hidden
    return head_fn(hidden, self.get_output_embeddings())


def use_head_fn_forward(model: PreTrainedModel) -> None:
    """Replaces the forward of a transformers model, which makes logits, by ``_forward``."""
    model.forward = MethodType(_forward, model)
