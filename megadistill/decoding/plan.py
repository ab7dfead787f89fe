"""What a decoder is made of, taken from a transformers model: which modules hold the weights of each component.

All supported families are the same computation (norm, attention, norm, two or three linear layers) with different
names. A plan maps the names once; ``decoding/decoder.py`` runs it. A model with a component that plans do not cover has
none, and is run by its own forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Activation = Callable[[torch.Tensor], torch.Tensor]
# Rotary types whose frequencies do not depend on the length of a text that the model can read: those of "dynamic"
# change beyond its positions, those of "longrope" where ``models.positions.check_positions`` ends.
_STATIC_ROPE = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")


def _inner(module: nn.Module) -> nn.Module:
    """The layer itself: adapters lie around it, and are merged into it while text is written."""
    inner = getattr(module, "base_layer", module)
    assert isinstance(inner, nn.Module)
    return inner


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight of a linear layer, a norm or an embedding."""
    weight = _inner(module).weight
    assert isinstance(weight, torch.Tensor)
    return weight


def bias_of(module: nn.Module) -> torch.Tensor | None:
    """The bias of a linear layer or a norm; None where it has none."""
    bias = getattr(_inner(module), "bias", None)
    assert bias is None or isinstance(bias, torch.Tensor)
    return bias


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
        eps: Any = module.variance_epsilon
        return cls(module, float(eps), True)


@dataclass(frozen=True)
class LayerPlan:
    """One layer.

    Attributes:
        module: Owns all parameters of the layer.
        attention_norm: The norm before attention.
        qkv: Queries, keys and values: three modules, or one with all of them, in this order.
        out: The linear layer after attention.
        mlp_norm: The norm before the MLP.
        up: The first linear layer of the MLP; where the MLP is gated, gate and up.
        down: The last linear layer of the MLP.
        q_norm: A norm over each head's query, before rotary positions.
        k_norm: The same of the keys.
        has_rope: Queries and keys are rotated, where positions are rotary.
    """

    module: nn.Module
    attention_norm: NormPlan
    qkv: tuple[nn.Module, ...]
    out: nn.Module
    mlp_norm: NormPlan
    up: tuple[nn.Module, ...]
    down: nn.Module
    q_norm: NormPlan | None = None
    k_norm: NormPlan | None = None
    has_rope: bool = True


@dataclass(frozen=True)
class DecoderPlan:
    """A decoder whose norms come before the linear layers.

    Attributes:
        embedding: Embedding of the tokens.
        layers: The layers, in order.
        final_norm: The norm after the last layer.
        activation: Between the linear layers of the MLP.
        num_heads: Attention heads of the whole model.
        num_kv_heads: Key-value heads of the whole model.
        head_dim: D, the size of a head.
        positions: Embedding of learned positions; None for rotary ones.
        position_offset: Position p is looked up at p + ``position_offset``.
        inv_freq: [D / 2] frequencies of rotary positions.
        rope_scale: Factor on the cosines and sines of rotary positions.
        score_scale: Factor on the products of queries and keys; None: head_dim^-0.5.
        embedding_scale: Factor on the embedding of the tokens.
        residual_scale: Factor on what attention and MLP add.
        has_fused_gate: ``up`` is one module with gate and up, in this order.
    """

    embedding: nn.Module
    layers: tuple[LayerPlan, ...]
    final_norm: NormPlan | None
    activation: Activation
    num_heads: int
    num_kv_heads: int
    head_dim: int
    positions: nn.Module | None = None
    position_offset: int = 0
    inv_freq: torch.Tensor | None = None
    rope_scale: float = 1.0
    score_scale: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    has_fused_gate: bool = False

    @property
    def is_gated(self) -> bool:
        """Whether the MLP is activation(gate) * up instead of activation(up)."""
        return self.has_fused_gate or len(self.layers[0].up) == 2


def _function(activation: Activation) -> Activation:
    """An activation without the hooks that an engine may have registered on its module; GELU as one operation."""
    from transformers.activations import NewGELUActivation

    if isinstance(activation, NewGELUActivation):  # written out there: eight operations
        return partial(nn.functional.gelu, approximate="tanh")
    return activation.forward if isinstance(activation, nn.Module) else activation


def key_value_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """(key-value heads of the whole model, head size)."""
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return num_heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_bytes_per_token(config: PreTrainedConfig, tp_size: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token in all layers, on one tensor-parallel rank."""
    num_heads, head_dim = key_value_shape(config)
    return int(2 * config.num_hidden_layers * -(-num_heads // tp_size) * head_dim * dtype.itemsize)


def _body(model: PreTrainedModel, name: str) -> Any:
    """The module below the head. What it holds depends on the family, so it has no types."""
    return model.get_submodule(name)


def no_plan(model: PreTrainedModel) -> DecoderPlan | None:
    """None: the family has parts that no plan covers, such as norms after attention or soft caps."""
    return None


def _has_windows(config: PreTrainedConfig) -> bool:
    """Whether a text that the model can read may be longer than the window of one of its layers."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and all(kind == "full_attention" for kind in kinds):
        return False
    others = kinds is not None and any(kind not in ("full_attention", "sliding_attention") for kind in kinds)
    return others or (window is not None and window < config.max_position_embeddings)


def llama_plan(model: PreTrainedModel) -> DecoderPlan | None:
    """Llama and what is like it; None for sliding windows and rotary types or parts of heads that no plan covers."""
    return _llama_like(
        model,
        qkv=lambda attention: (attention.q_proj, attention.k_proj, attention.v_proj),
        up=lambda mlp: (mlp.gate_proj, mlp.up_proj),
        activation=lambda mlp: mlp.act_fn,
    )


def phi3_plan(model: PreTrainedModel) -> DecoderPlan | None:
    """Phi-3 and Phi-4, which are like Llama but for fused products; None where ``llama_plan`` has none."""
    return _llama_like(
        model,
        qkv=lambda attention: (attention.qkv_proj,),
        up=lambda mlp: (mlp.gate_up_proj,),
        activation=lambda mlp: mlp.activation_fn,
    )


def _llama_like(
    model: PreTrainedModel,
    qkv: Callable[[Any], tuple[nn.Module, ...]],
    up: Callable[[Any], tuple[nn.Module, ...]],
    activation: Callable[[Any], Activation],
) -> DecoderPlan | None:
    config, body = model.config, _body(model, "model")
    rotary = body.rotary_emb
    num_kv_heads, head_dim = key_value_shape(config)
    if rotary.rope_type not in _STATIC_ROPE or 2 * len(rotary.inv_freq) != head_dim or _has_windows(config):
        return None
    layers = []
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        has_norms = hasattr(attention, "q_norm")
        layers.append(
            LayerPlan(
                module=layer,
                attention_norm=NormPlan.of(layer.input_layernorm),
                qkv=qkv(attention),
                out=attention.o_proj,
                mlp_norm=NormPlan.of(layer.post_attention_layernorm),
                up=up(mlp),
                down=mlp.down_proj,
                q_norm=NormPlan.of(attention.q_norm) if has_norms else None,
                k_norm=NormPlan.of(attention.k_norm) if has_norms else None,
                has_rope=bool(getattr(attention, "use_rope", True)),
            )
        )
    return DecoderPlan(
        embedding=body.embed_tokens,
        layers=tuple(layers),
        final_norm=NormPlan.of(body.norm),
        activation=_function(activation(body.layers[0].mlp)),
        num_heads=config.num_attention_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        inv_freq=rotary.inv_freq,
        rope_scale=float(rotary.attention_scaling),
        score_scale=float(body.layers[0].self_attn.scaling),
        embedding_scale=float(getattr(config, "embedding_multiplier", 1.0)),
        residual_scale=float(getattr(config, "residual_multiplier", 1.0)),
        has_fused_gate=len(layers[0].up) == 1,
    )


def opt_plan(model: PreTrainedModel) -> DecoderPlan | None:
    """OPT whose norms come first; None for OPT-350m, where they come last and the embedding is projected."""
    config, body = model.config, _body(model, "model.decoder")
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


def gpt2_plan(model: PreTrainedModel) -> DecoderPlan | None:
    """GPT-2 after its ``Conv1D`` became ``nn.Linear``; None for the variants that scale attention otherwise."""
    config, body = model.config, _body(model, "transformer")
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
