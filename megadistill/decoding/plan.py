"""What a decoder is made of, read off a transformers model: which modules hold the weights of each part.

All supported families are the same machine (norm, attention, norm, two or three products) with different names. A plan
maps the names once; ``engines/decoder.py`` runs it. A model with a part that the plan does not know has none and is run
by its own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Rotary types whose frequencies do not depend on the length of the text.
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class NormPlan:
    """A layer norm, or a root-mean-square norm (``is_rms``), with its weights in ``module``."""

    module: nn.Module
    eps: float
    is_rms: bool

    @classmethod
    def of(cls, module: nn.Module) -> NormPlan:
        """Reads the kind off the module: transformers' RMS norms name their epsilon ``variance_epsilon``."""
        if isinstance(module, nn.LayerNorm):
            return cls(module, module.eps, False)
        return cls(module, float(module.variance_epsilon), True)


@dataclass(frozen=True)
class LayerPlan:
    """One layer. ``qkv``: one fused or three modules; ``up``: one module, or gate and up; products of a part are joined
    in this order. ``module`` owns all parameters of the layer."""

    module: nn.Module
    attention_norm: NormPlan
    qkv: tuple[nn.Module, ...]
    out: nn.Module
    mlp_norm: NormPlan
    up: tuple[nn.Module, ...]
    down: nn.Module
    q_norm: NormPlan | None = None
    k_norm: NormPlan | None = None


@dataclass(frozen=True)
class DecoderPlan:
    """A decoder with its norms before the products. Head counts are those of the whole model.

    ``positions``: learned positions, looked up at position + ``position_offset``; else ``inv_freq`` [head_dim / 2] of
    rotary ones, whose cosines and sines are multiplied by ``rope_scale``.
    """

    embedding: nn.Module
    layers: tuple[LayerPlan, ...]
    final_norm: NormPlan | None
    activation: Callable[[torch.Tensor], torch.Tensor]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    positions: nn.Module | None = None
    position_offset: int = 0
    inv_freq: torch.Tensor | None = None
    rope_scale: float = 1.0

    @property
    def is_gated(self) -> bool:
        """activation(gate) * up instead of activation(up)."""
        return len(self.layers[0].up) == 2


def _function(activation: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """An activation without the hooks that an engine may have hung on its module."""
    return activation.forward if isinstance(activation, nn.Module) else activation


def key_value_shape(config: Any) -> tuple[int, int]:
    """(key-value heads of the whole model, size of a head)."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_bytes_per_token(config: Any, tp_size: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token in all layers, on one tensor-parallel rank."""
    heads, head_dim = key_value_shape(config)
    return 2 * config.num_hidden_layers * -(-heads // tp_size) * head_dim * dtype.itemsize


def llama_plan(model: nn.Module) -> DecoderPlan | None:
    """Llama, Qwen2 and Qwen3; None for sliding windows and rotary types that depend on the length."""
    config, body = model.config, model.model
    rotary = body.rotary_emb
    if rotary.rope_type not in _STATIC_ROPE:
        return None
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return None
    layers = []
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        has_norms = hasattr(attention, "q_norm")
        layers.append(
            LayerPlan(
                module=layer,
                attention_norm=NormPlan.of(layer.input_layernorm),
                qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
                out=attention.o_proj,
                mlp_norm=NormPlan.of(layer.post_attention_layernorm),
                up=(mlp.gate_proj, mlp.up_proj),
                down=mlp.down_proj,
                q_norm=NormPlan.of(attention.q_norm) if has_norms else None,
                k_norm=NormPlan.of(attention.k_norm) if has_norms else None,
            )
        )
    num_kv_heads, head_dim = key_value_shape(config)
    return DecoderPlan(
        embedding=body.embed_tokens,
        layers=tuple(layers),
        final_norm=NormPlan.of(body.norm),
        activation=_function(body.layers[0].mlp.act_fn),
        num_heads=config.num_attention_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        inv_freq=rotary.inv_freq,
        rope_scale=float(rotary.attention_scaling),
    )


def opt_plan(model: nn.Module) -> DecoderPlan | None:
    """OPT with its norms before the products; None for OPT-350m, which has them behind and a projected embedding."""
    config, body = model.config, model.model.decoder
    if not config.do_layer_norm_before or body.project_in is not None or not config.layer_norm_elementwise_affine:
        return None
    layers = [
        LayerPlan(
            module=layer,
            attention_norm=NormPlan.of(layer.self_attn_layer_norm),
            qkv=(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            out=layer.self_attn.out_proj,
            mlp_norm=NormPlan.of(layer.final_layer_norm),
            up=(layer.fc1,),
            down=layer.fc2,
        )
        for layer in body.layers
    ]
    return DecoderPlan(
        embedding=body.embed_tokens,
        layers=tuple(layers),
        final_norm=None if body.final_layer_norm is None else NormPlan.of(body.final_layer_norm),
        activation=_function(body.layers[0].activation_fn),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        positions=body.embed_positions,
        position_offset=body.embed_positions.offset,
    )


def gpt2_plan(model: nn.Module) -> DecoderPlan | None:
    """GPT-2 after its ``Conv1D`` became ``nn.Linear``; None for the variants that scale attention otherwise."""
    config, body = model.config, model.transformer
    if config.scale_attn_by_inverse_layer_idx or config.reorder_and_upcast_attn or not config.scale_attn_weights:
        return None
    layers = [
        LayerPlan(
            module=block,
            attention_norm=NormPlan.of(block.ln_1),
            qkv=(block.attn.c_attn,),
            out=block.attn.c_proj,
            mlp_norm=NormPlan.of(block.ln_2),
            up=(block.mlp.c_fc,),
            down=block.mlp.c_proj,
        )
        for block in body.h
    ]
    return DecoderPlan(
        embedding=body.wte,
        layers=tuple(layers),
        final_norm=NormPlan.of(body.ln_f),
        activation=_function(body.h[0].mlp.act),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        positions=body.wpe,
    )
