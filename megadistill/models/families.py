"""How each model family is cut: which module is the decoder, which counts tensor parallelism must divide, what AutoTP
needs.

Everything that depends on a family is a row of ``FAMILIES``; nothing else in the project asks for a model type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megadistill.decoding.plan import DecoderPlan, gpt2_plan, llama_plan, opt_plan
from megadistill.errors import ConfigError


@dataclass(frozen=True)
class Family:
    """One row: everything the engines and exporters must know of a family.

    ``head_counts`` names the configuration attributes whose values tp_size must divide. ``partition_config`` is
    AutoTP's explicit plan where DeepSpeed has none. ``prepare`` changes the module before it is cut, ``post_shard``
    corrects what AutoTP forgets, ``export`` turns a full (name, tensor) pair back into the family's standard layout.
    ``plan`` describes a prepared model to the project's decoder; None where only the family's own forward will do.
    ``columns`` and ``rows`` name the linear layers that tensor parallelism cuts by output and by input, ``fused`` how
    many of them lie in one: what AutoTP does, for tools that run without it.
    """

    head_counts: tuple[str, ...]
    plan: Callable[[nn.Module], DecoderPlan | None]
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    fused: tuple[tuple[str, int], ...] = ()
    partition_config: dict[str, Any] | None = None
    prepare: Callable[[nn.Module], None] | None = None
    post_shard: Callable[[nn.Module, int], None] | None = None
    export: Callable[[str, torch.Tensor], torch.Tensor] | None = None

    def blocks(self, name: str) -> int:
        """Number of parameters that lie fused along the cut dimension of parameter ``name``."""
        return dict(self.fused).get(_layer(name), 1)

    def shard_dim(self, name: str, *, is_tied: bool) -> int | None:
        """The dimension of a prepared model's parameter that tensor parallelism cuts; None: every rank has all of
        it."""
        layer = _layer(name)
        if layer in self.columns or layer == "lm_head" or (is_tied and layer in ("embed_tokens", "wte")):
            return 0
        return 1 if layer in self.rows and name.endswith(".weight") else None


def _layer(name: str) -> str:
    return name.split(".")[-2]


def _gpt2_conv1d_to_linear(model: nn.Module) -> None:
    """GPT-2 stores [in, out] weights in ``Conv1D``; AutoTP cuts ``nn.Linear`` [out, in] only."""
    from transformers.pytorch_utils import Conv1D

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Conv1D):
                with torch.device("meta"):
                    linear = nn.Linear(child.weight.shape[0], child.weight.shape[1])
                linear.weight = nn.Parameter(child.weight.data.t().contiguous())
                linear.bias = nn.Parameter(child.bias.data)
                setattr(module, name, linear)


def _gpt2_split_sizes(model: nn.Module, tp_size: int) -> None:
    """AutoTP divides ``num_heads`` and forgets the width at which the fused query-key-value product is split."""
    for block in model.transformer.h:
        block.attn.split_size //= tp_size


_GPT2_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def _gpt2_export(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.t().contiguous() if name.endswith(_GPT2_TRANSPOSED) else tensor


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

_LLAMA_LIKE = Family(
    head_counts=("num_attention_heads", "num_key_value_heads"),
    plan=llama_plan,
    columns=("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
    rows=("o_proj", "down_proj"),
)
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "opt": Family(
        head_counts=("num_attention_heads",),
        plan=opt_plan,
        columns=("q_proj", "k_proj", "v_proj", "fc1"),
        rows=("out_proj", "fc2"),
    ),
    "gpt2": Family(
        head_counts=("num_attention_heads",),
        plan=gpt2_plan,
        columns=("c_attn", "c_fc"),
        rows=("c_proj",),
        fused=(("c_attn", 3),),
        partition_config=_GPT2_PARTITION,
        prepare=_gpt2_conv1d_to_linear,
        post_shard=_gpt2_split_sizes,
        export=_gpt2_export,
    ),
}


def family_of(config: Any, where: str) -> Family:
    """The family of a transformers configuration. Raises ConfigError naming ``where`` for one that is not supported."""
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"{where}: model type '{config.model_type}' is not supported; allowed: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[config.model_type]


def head_counts(config: Any, where: str) -> list[int]:
    """Counts of heads that the tensor-parallel size must divide (attention heads, key-value heads)."""
    return [int(getattr(config, name)) for name in family_of(config, where).head_counts]
