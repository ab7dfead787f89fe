"""One layer of a decoder: its weights, laid out for its products, and what it computes before and after attention.

Where weights are copied anyway, the copies hold more than one factor: in float32 and float64 the weight of the norm
before a product and the scale of attention, always the order of queries and keys in which rotary positions are one
product.

Shapes: T tokens, H hidden size, D head size; "heads" counts this rank's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from megadistill.decoding.linear import HeadNorms, Norm, paired, rotate_
from megadistill.decoding.plan import DecoderPlan, LayerPlan, bias_of, weight_of
from megadistill.decoding.products import Layout, Product, ProductLayouts, is_packable
from megadistill.parallel.collectives import all_reduce_sum
from megadistill.parallel.vocab import VocabShard

# Weights up to this size are joined on accelerators: one launch instead of two or three. Larger ones are not copied.
_MAX_JOINED_BYTES = 2**24


class Layer:
    """A layer of this rank. Communicates as the model does: two all-reduces over the tensor-parallel group.

    Args:
        plan: The decoder.
        layer: The layer, whose parameters are present.
        shard: Knows the tensor-parallel group.
        layouts: Of the weights.

    Attributes:
        scale: The factor on the products of queries and keys that is still missing.
    """

    def __init__(self, plan: DecoderPlan, layer: LayerPlan, shard: VocabShard, layouts: ProductLayouts) -> None:
        self._plan, self._group, self._has_rope = plan, shard.group, layer.has_rope
        self.scale = plan.head_dim**-0.5 if plan.score_scale is None else plan.score_scale
        num_heads, num_kv_heads = plan.num_heads // shard.tp_size, plan.num_kv_heads // shard.tp_size
        self._split = num_heads + num_kv_heads
        qkv, up = _Joined(layer.qkv, layouts.qkv), _Joined(layer.up, layouts.up)
        self._is_paired = plan.inv_freq is not None and layer.has_rope and qkv.is_copy
        self._head_norms: HeadNorms | None = None
        if layer.q_norm is not None and layer.k_norm is not None:
            self._head_norms = HeadNorms(layer.q_norm, layer.k_norm, num_heads, num_kv_heads, is_paired=self._is_paired)
        if self._is_paired:
            qkv.pair(self._split, plan.head_dim)
        if qkv.is_copy and qkv.is_wide:
            if self._head_norms is None:
                qkv.scale(num_heads * plan.head_dim, self.scale)
            else:
                self._head_norms.scale(num_heads, self.scale)
            self.scale = 1.0
        self._before_attention, self._qkv = qkv.after(Norm(layer.attention_norm)), qkv.products()
        self._before_mlp, self._up = up.after(Norm(layer.mlp_norm)), up.products()
        # Where its inputs are sharded, a layer's bias is added once, after the sum over the shards.
        biases = (bias_of(layer.out), bias_of(layer.down))
        none: tuple[Tensor | None, Tensor | None] = (None, None)
        here, self._late_biases = (biases, none) if shard.group is None else (none, biases)
        self._out = Product(weight_of(layer.out), here[0], layouts.out)
        self._down = Product(weight_of(layer.down), here[1], layouts.down)

    def qkv(self, x: Tensor, rope: Tensor | None) -> Tensor:
        """Queries, keys and values [T, heads + 2 key-value heads, D] of x [T, H].

        Args:
            x: What the layer reads.
            rope: [T or 1, 1, D / 2] rotary positions as complex numbers; None for other kinds.
        """
        qkv = _apply(self._qkv, self._before_attention(x)).view(len(x), -1, self._plan.head_dim)
        qk = qkv[:, : self._split]
        if self._head_norms is not None:
            self._head_norms.normalize_(qk)
        if rope is not None and self._has_rope:
            rotate_(qk, rope, is_paired=self._is_paired)
        return qkv

    def after_attention(self, x: Tensor, attn_out: Tensor) -> Tensor:
        """The rest of the layer.

        Args:
            x: [T, H] what the layer reads; its storage is reused.
            attn_out: [T, heads * D].
        """
        x = self._add(x, self._out, attn_out, self._late_biases[0])
        up = _apply(self._up, self._before_mlp(x))
        if self._plan.is_gated:
            gate, up = up.chunk(2, -1)
            up = self._plan.activation(gate) * up
        else:
            up = self._plan.activation(up)
        return self._add(x, self._down, up, self._late_biases[1])

    def _add(self, x: Tensor, product: Product, y: Tensor, late_bias: Tensor | None) -> Tensor:
        """X plus a product whose inputs may be sharded, times the plan's ``residual_scale``."""
        factor = self._plan.residual_scale
        if factor != 1:
            added = product(y) if self._group is None else all_reduce_sum(product(y), self._group)
            return x.add_(added if late_bias is None else added.add_(late_bias), alpha=factor)
        if self._group is None:
            return product.add_to(x, y)
        x = x.add_(all_reduce_sum(product(y), self._group))
        return x if late_bias is None else x.add_(late_bias)


def _apply(products: Sequence[Product], x: Tensor) -> Tensor:
    """All products of x [T, inputs], side by side: [T, outputs of all]."""
    if len(products) == 1:
        return products[0](x)
    y = x.new_empty(len(x), sum(product.outputs for product in products))
    for product, out in zip(products, y.split([product.outputs for product in products], 1), strict=True):
        product(x, out)
    return y


class _Joined:
    """Linear layers of one input while they are laid out: joined in a copy, or each as it is.

    Args:
        modules: The linear layers, in order.
        layout: Of the weights.

    Attributes:
        is_copy: Weights and biases are copies, one of each.
        is_wide: Float32 or float64, in which factors may be folded in.
    """

    def __init__(self, modules: Sequence[nn.Module], layout: Layout) -> None:
        self._weights = [weight_of(module).detach() for module in modules]
        self._biases = [bias_of(module) for module in modules]
        self._layout: Layout = layout
        self.is_wide = self._weights[0].dtype in (torch.float32, torch.float64)
        is_small = sum(weight.nbytes for weight in self._weights) <= _MAX_JOINED_BYTES
        self.is_copy = layout != "plain" and (is_packable(self._weights[0]) or is_small)
        if self.is_copy:
            self._weights = [torch.cat(self._weights)]
            present = [bias for bias in self._biases if bias is not None]
            assert len(present) in (0, len(modules))
            self._biases = [torch.cat(present).detach() if present else None]

    def _copies(self) -> list[Tensor]:
        assert self.is_copy
        return [part for part in (self._weights[0], self._biases[0]) if part is not None]

    def pair(self, num_heads: int, head_dim: int) -> None:
        """Puts the outputs of the first heads into the order of ``paired``."""
        for part in self._copies():
            heads = part[: num_heads * head_dim].unflatten(0, (num_heads, head_dim))
            heads.copy_(paired(heads))

    def scale(self, num_outputs: int, factor: float) -> None:
        """Multiplies the first outputs."""
        for part in self._copies():
            part[:num_outputs].mul_(factor)

    def after(self, norm: Norm) -> Callable[[Tensor], Tensor]:
        """What comes before the products; its weight goes into them where that is possible."""
        if not self.is_copy or norm.fold is None:
            return norm
        self._weights[0].mul_(norm.fold)
        return norm.without_weight

    def products(self) -> list[Product]:
        """The products, of which there is one where weights were joined."""
        return [Product(weight, bias, self._layout) for weight, bias in zip(self._weights, self._biases, strict=True)]
