"""Floating-point operations of products and attention, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import flop_counter

_aten = torch.ops.aten


def packed_weight(args: Sequence[Any]) -> Any:
    """The weight [outputs, inputs] among the arguments of oneDNN's product, which may add to its second one."""
    return args[1] if args[2] is None or args[2].dim() == 1 else args[2]


def _linear_pointwise(*args: Any, **_: Any) -> int:
    """OneDNN's product with a packed weight."""
    return int(2 * args[0].numel() * packed_weight(args).shape[0])


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(flop_counter.sdpa_flop_count(query.shape, _expanded(query, key), _expanded(query, value)))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(
        flop_counter.sdpa_backward_flop_count(
            gradient.shape, query.shape, _expanded(query, key), _expanded(query, value)
        )
    )


def _expanded(query: Any, key: Any) -> tuple[int, ...]:
    """Shape of keys or values as if every query head had its own."""
    return (*key.shape[:1], query.shape[1], *key.shape[2:])


# What torch's own table leaves out because it counts for CUDA.
_OURS: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.mkldnn._linear_pointwise: _linear_pointwise,
}


def count_flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Floating-point operations of one dispatched operation; 0 for all but products and attention.

    Causal attention counts as if all were attended to, as usual.

    Args:
        func: The operation.
        args: Its arguments.
        kwargs: Its keyword arguments.
        out: Its result.
    """
    packet = func._overloadpacket
    ours = _OURS.get(packet)
    if ours is not None:
        return ours(*args, **kwargs)
    if packet is _aten.mm:
        return 2 * args[0].numel() * args[1].shape[1]
    if packet in (_aten.addmm, _aten.addmm_):
        return 2 * args[1].numel() * args[2].shape[1]
    if packet is _aten.bmm:
        return 2 * args[0].numel() * args[1].shape[2]
    if packet in (_aten.baddbmm, _aten.baddbmm_):
        return 2 * args[1].numel() * args[2].shape[2]
    if packet is _aten.mv:
        return 2 * args[0].numel()
    if packet is _aten.addmv:
        return 2 * args[1].numel()
    if packet is _aten._flash_attention_forward:
        return _packed_attention(*args)
    formula = flop_counter.flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def _packed_attention(query: Any, key: Any, value: Any, *rest: Any) -> int:
    """Sequences one after the other, of which only the sum and the longest are known here: an upper bound."""
    max_keys = rest[3]
    num_heads, head_dim = query.shape[-2:]
    num_queries = math.prod(query.shape[:-2])
    return 4 * num_queries * max_keys * num_heads * head_dim
