"""How each model family is sharded: the layers that tensor parallelism splits, and what AutoTP needs to be told.

Everything that depends on a family is an entry of ``FAMILIES``; nothing else in the project asks for a model type.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from megadistill.decoding.plan import DecoderPlan, gpt2_plan, key_value_shape, llama_plan, no_plan, opt_plan, phi3_plan
from megadistill.errors import ConfigError
from megadistill.models.refusals import reason_against
from megadistill.models.shard_spec import Blocks
from megadistill.models.sharded_parts import norm_over_ranks, share_heads
from megadistill.observability.log import get_logger
from megadistill.parallel.context import ParallelContext

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


_HEAD = "lm_head.weight"
BASE, LORA_A, LORA_B = "base_layer", "lora_A", "lora_B"  # what peft calls the parts of a layer with adapters


@dataclass(frozen=True)
class Family:
    """All that engines and exporters must know of a family.

    ``column_parallel``, ``row_parallel`` and ``fused`` repeat what AutoTP does, for tools that run without it.

    Attributes:
        head_counts: Attributes of the configuration whose values tp_size must divide.
        plan: Describes a prepared model to the project's decoder; gives None where only the family's own forward pass
            will do.
        column_parallel: Linear layers that are sharded along their outputs.
        row_parallel: Linear layers that are sharded along their inputs.
        fused: (layer, n): n linear layers of equal size lie in one along the outputs; of unequal ones, their sizes.
        sized: ``sized(family, config)`` fills in what depends on a model's sizes; ``family_of`` does it.
        partition_config: AutoTP's explicit plan, where DeepSpeed has none.
        prepare: Changes the model before it is sharded.
        post_shard: ``post_shard(model, context)`` corrects what AutoTP forgets.
        attention: The only attention implementation of transformers that computes this family; None: any.
        stored_head: What the head's weight is called in the family's files.
        transposed: Ends of the names of parameters that ``prepare`` transposes: the family's files have them as
            [in, out].
    """

    head_counts: tuple[str, ...]
    plan: Callable[[PreTrainedModel], DecoderPlan | None]
    column_parallel: tuple[str, ...]
    row_parallel: tuple[str, ...]
    fused: tuple[tuple[str, Blocks], ...] = ()
    sized: Callable[[Family, PreTrainedConfig], Family] | None = None
    partition_config: dict[str, Any] | None = None
    prepare: Callable[[PreTrainedModel], None] | None = None
    post_shard: Callable[[PreTrainedModel, ParallelContext], None] | None = None
    attention: str | None = None
    stored_head: str = _HEAD
    transposed: tuple[str, ...] = ()

    def plan_or_say(self, model: PreTrainedModel, rank: int) -> DecoderPlan | None:
        """``plan``; where there is none, rank 0 logs it."""
        plan = self.plan(model)
        if plan is None:
            get_logger(rank, "model").info(
                f"{model.config.model_type}: text is written and read by the model's own forward pass, because the "
                "decoder has no plan for this configuration"
            )
        return plan

    def attention_for(self, asked: str, where: str, rank: int) -> str:
        """The attention implementation that the family takes; where it is another than asked for, rank 0 logs it."""
        if self.attention in (None, asked):
            return asked
        get_logger(rank, "model").info(
            f"{where}: the family has {self.attention} attention alone, and takes it in place of {asked}"
        )
        return str(self.attention)

    def export(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A whole parameter in the family's standard layout."""
        return tensor.t().contiguous() if name.endswith(self.transposed) else tensor

    def stored_name(self, parameter: str) -> str:
        """What a parameter is called in the family's files."""
        return self.stored_head if parameter == _HEAD else parameter

    def parameter_name(self, stored: str) -> str:
        """The parameter that a tensor of the family's files is."""
        return _HEAD if stored == self.stored_head else stored

    def blocks(self, name: str) -> Blocks:
        """Number or sizes of the parameters that lie fused along the sharded dimension of parameter ``name``."""
        return dict(self.fused).get(_layer(name), 1)

    def shard_dim(self, name: str, *, is_tied: bool) -> int | None:
        """The dimension along which tensor parallelism shards a parameter; None where every rank holds the whole.

        Args:
            name: The parameter's name in a prepared model.
            is_tied: Embedding and head are one parameter.
        """
        layer, adapter = _layer(name), name.split(".")[-2]
        if layer in self.column_parallel or layer == "lm_head" or (is_tied and layer in _EMBEDDINGS):
            return None if adapter == LORA_A else 0
        is_row = layer in self.row_parallel and name.endswith(".weight") and adapter != LORA_B
        return 1 if is_row else None


_EMBEDDINGS = ("embed_tokens", "embed_in", "wte")


def _layer(name: str) -> str:
    """The layer of a parameter, also of one with adapters: their parts are layers below it."""
    *_, above, layer, _ = name.split(".") if name.count(".") > 1 else ("", *name.split("."))
    return above if layer in (BASE, LORA_A, LORA_B) else layer


def _gpt2_conv1d_to_linear(model: PreTrainedModel) -> None:
    """GPT-2 stores [in, out] weights in ``Conv1D``; AutoTP shards ``nn.Linear`` [out, in] only."""
    from transformers.pytorch_utils import Conv1D

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Conv1D):
                with torch.device("meta"):
                    linear = nn.Linear(child.weight.shape[0], child.weight.shape[1])
                linear.weight = nn.Parameter(child.weight.data.t().contiguous())
                linear.bias = nn.Parameter(child.bias.data)
                setattr(module, name, linear)


def _gpt2_split_sizes(model: PreTrainedModel, context: ParallelContext) -> None:
    """AutoTP divides ``num_heads`` and forgets the width at which the fused queries, keys and values are split."""
    body: Any = model.get_submodule("transformer")
    for block in body.h:
        block.attn.split_size //= context.tp_size


_GPT2_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


_GPT2_PARTITION = {
    "use_default_specs": False,
    "layer_specs": [
        {
            "patterns": [r".*attn\.c_attn\.(weight|bias)$"],
            "partition_type": "column",
            "shape": [3, -1],
            "partition_dim": 0,
        },
        {"patterns": [r".*mlp\.c_fc\.(weight|bias)$"], "partition_type": "column"},
        {"patterns": [r".*c_proj\.(weight|bias)$"], "partition_type": "row"},
    ],
}


def _gemma_embedding(model: PreTrainedModel) -> None:
    """AutoTP knows the scaled embedding of Gemma 3, which is the code of those of Gemma 1 and 2."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    model.get_input_embeddings().__class__ = Gemma3TextScaledWordEmbedding


def _phi3_sizes(family: Family, config: PreTrainedConfig) -> Family:
    """Queries, keys and values are one product, and so are gate and up."""
    heads, head_dim = key_value_shape(config)
    qkv = (config.num_attention_heads * head_dim, heads * head_dim, heads * head_dim)
    specs = [
        _cut(r".*self_attn\.qkv_proj", "column", shape=[list(qkv), -1], partition_dim=0),
        _cut(r".*mlp\.gate_up_proj", "column", shape=[2, -1], partition_dim=0),
        _cut(r".*(o_proj|down_proj)", "row"),
    ]
    return replace(
        family,
        fused=(("qkv_proj", qkv), ("gate_up_proj", 2)),
        partition_config={"use_default_specs": False, "layer_specs": specs},
    )


def _cut(layers: str, kind: str, **more: Any) -> dict[str, Any]:
    """What AutoTP is told of the weights of some layers."""
    return {"patterns": [layers + r"\.weight$"], "partition_type": kind, **more}


# The plan of transformers gives every rank all queries and keys, because of the norms.
_OLMO2_PARTITION = {
    "use_default_specs": False,
    "layer_specs": [
        _cut(r".*(q_proj|k_proj|v_proj|gate_proj|up_proj)", "column"),
        _cut(r".*(o_proj|down_proj)", "row"),
        _cut(r".*(q_norm|k_norm)", "skip", grad_allreduce=True),
    ],
}


_LLAMA_LIKE = Family(
    head_counts=("num_attention_heads", "num_key_value_heads"),
    plan=llama_plan,
    column_parallel=("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
    row_parallel=("o_proj", "down_proj"),
)
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "smollm3": _LLAMA_LIKE,
    "granite": _LLAMA_LIKE,
    "gemma": replace(_LLAMA_LIKE, plan=no_plan, prepare=_gemma_embedding),
    "gemma2": replace(_LLAMA_LIKE, plan=no_plan, prepare=_gemma_embedding, attention="eager"),
    "gemma3_text": replace(_LLAMA_LIKE, plan=no_plan),
    "olmo2": replace(_LLAMA_LIKE, plan=no_plan, partition_config=_OLMO2_PARTITION, post_shard=norm_over_ranks),
    "phi3": replace(
        _LLAMA_LIKE,
        plan=phi3_plan,
        column_parallel=("qkv_proj", "gate_up_proj"),
        sized=_phi3_sizes,
        post_shard=share_heads,
    ),
    "gpt_neox": Family(
        head_counts=("num_attention_heads",),
        plan=no_plan,
        column_parallel=("query_key_value", "dense_h_to_4h"),
        row_parallel=("dense", "dense_4h_to_h"),
        stored_head="embed_out.weight",
    ),
    "opt": Family(
        head_counts=("num_attention_heads",),
        plan=opt_plan,
        column_parallel=("q_proj", "k_proj", "v_proj", "fc1"),
        row_parallel=("out_proj", "fc2"),
    ),
    "gpt2": Family(
        head_counts=("num_attention_heads",),
        plan=gpt2_plan,
        column_parallel=("c_attn", "c_fc"),
        row_parallel=("c_proj",),
        fused=(("c_attn", 3),),
        partition_config=_GPT2_PARTITION,
        prepare=_gpt2_conv1d_to_linear,
        post_shard=_gpt2_split_sizes,
        transposed=_GPT2_TRANSPOSED,
    ),
}


def family_of(config: PreTrainedConfig, where: str) -> Family:
    """The family of a transformers configuration.

    Args:
        config: The configuration.
        where: The key or option that names the model; the error begins with it.

    Raises:
        ConfigError: The family is not supported.
    """
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"{where}: model type '{config.model_type}' is not supported: {reason_against(config)}; allowed: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[config.model_type]
    return family if family.sized is None else family.sized(family, config)


def has_own_head(names: Collection[str]) -> bool:
    """Whether a model with parameters of these names has a head of its own; else it is tied to the embedding."""
    return _HEAD in names


_HEADS = {"num_attention_heads": "attention heads", "num_key_value_heads": "key-value heads"}


def head_counts(config: PreTrainedConfig, where: str) -> dict[str, int]:
    """Counts of heads that the tensor-parallel size must divide, by what they are ("key-value heads of WHERE").

    Args:
        config: A transformers configuration.
        where: The key or option that names the model; the error begins with it.

    Raises:
        ConfigError: The family is not supported.
    """
    names = family_of(config, where).head_counts
    return {f"{_HEADS[name]} of {where}": int(getattr(config, name)) for name in names}
