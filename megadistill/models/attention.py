"""Attention over sequences that follow one another in one row, without padding (in the field: padding-free, varlen).

Each sequence sees itself alone, so the cost is the sum of the squared lengths, and no mask of the whole row exists. On
CUDA in half precision it is one call of torch's flash attention for variable lengths; elsewhere each sequence goes
through the attention that the model has anyway.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIX = "padding_free_"


def use_padding_free_attention(model: PreTrainedModel) -> None:
    """Lets a model read rows of ``data.collate.concatenated``, besides padded batches, which it reads as before.

    Args:
        model: A model with attention implementation "sdpa" or "eager".
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    implementation = model.config._attn_implementation
    usual_mask = ALL_MASK_ATTENTION_FUNCTIONS[implementation]

    def mask(*arguments: Any, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
        """None without a 2D mask: the sequences' bounds say what sees what."""
        return None if attention_mask is None else usual_mask(*arguments, attention_mask=attention_mask, **options)

    AttentionInterface.register(_PREFIX + implementation, _attend)
    AttentionMaskInterface.register(_PREFIX + implementation, mask)
    model.set_attn_implementation(_PREFIX + implementation)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    lengths: tuple[int, ...] = (),
    bounds: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers' attention layers call.

    Args:
        module: The layer.
        query: [B, heads, S, D]; B is 1 where sequences follow one another.
        key: [B, key-value heads, S, D].
        value: [B, key-value heads, S, D].
        attention_mask: Of a padded batch; else None.
        lengths: Of the sequences, which follow one another; empty for a padded batch.
        bounds: [len(lengths) + 1] int32, where they begin and end.
        options: ``scaling``, ``dropout``, and what else a family passes.

    Returns:
        The output [B, S, heads, D], and the attention's weights, where an implementation has them.
    """
    usual = _usual_attention(module)
    if bounds is None:
        return usual(module, query, key, value, attention_mask, **options)
    window = options.get("sliding_window")
    if _has_flash(query) and not options.get("dropout") and not options.get("softcap"):
        return _flash(query, key, value, bounds, max(lengths), options.get("scaling"), window), None
    sequences = zip(*(heads.split(lengths, dim=2) for heads in (query, key, value)), strict=True)
    outputs = [usual(module, q, k, v, _causal_mask(module, q, window), **options)[0] for q, k, v in sequences]
    return torch.cat(outputs, dim=1), None


def _flash(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None, window: int | None
) -> Tensor:
    """One kernel for all sequences."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (heads[0].transpose(0, 1) for heads in (query, key, value))  # [S, heads, D]
    seen = (-1 if window is None else window - 1, 0)  # columns to the left and right
    output = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=seen, enable_gqa=True)
    assert isinstance(output, Tensor)
    return output.unsqueeze(0)


def _usual_attention(module: nn.Module) -> Any:
    """What the layer would call without this module: each family has an eager attention of its own."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if _is_eager(module):
        if getattr(module, "reorder_and_upcast_attn", False):  # an option of GPT-2's
            return lambda layer, q, k, v, mask, **_: layer._upcast_and_reordered_attn(q, k, v, mask)
        return sys.modules[type(module).__module__].eager_attention_forward
    return sdpa_attention_forward


def _is_eager(module: Any) -> bool:
    return bool(module.config._attn_implementation == _PREFIX + "eager")


def _has_flash(query: Tensor) -> bool:
    """Whether torch's flash attention takes such heads."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _causal_mask(module: nn.Module, query: Tensor, window: int | None) -> Tensor | None:
    """The mask of one sequence; None where the implementation is causal by itself."""
    length = query.shape[2]
    is_eager = _is_eager(module)
    if not is_eager and (window is None or length <= window):
        return None
    column = torch.arange(length, device=query.device)
    distance = column[:, None] - column
    seen = (distance >= 0) & (distance < (window or length))
    if not is_eager:
        return seen[None, None]
    return torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, torch.finfo(query.dtype).min)[None, None]
