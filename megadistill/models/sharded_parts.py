"""What AutoTP leaves undone in families whose layers mix heads, or read the number of heads off the configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megadistill.parallel.collectives import differentiable_sum
from megadistill.parallel.context import ParallelContext
from megadistill.parallel.vocab import VocabShard

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class ShareOfConfig:
    """A configuration as one tensor-parallel rank sees it: its share of the heads, everything else as it is.

    Args:
        config: The configuration of the whole model, which later changes pass through.
        tp_size: Number of shards.
    """

    def __init__(self, config: PreTrainedConfig, tp_size: int) -> None:
        self._whole, self.num_attention_heads = config, config.num_attention_heads // tp_size

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_whole":  # asked for by copies, before there is a whole
            raise AttributeError(name)
        return getattr(self._whole, name)


def share_heads(model: PreTrainedModel, context: ParallelContext) -> None:
    """Gives each attention layer of Phi-3 a configuration with this rank's heads: it splits its product by it."""
    body: Any = model.get_submodule("model")
    for layer in body.layers:
        layer.self_attn.config = ShareOfConfig(model.config, context.tp_size)


def norm_over_ranks(model: PreTrainedModel, context: ParallelContext) -> None:
    """Lets the norms of OLMo 2's queries and keys, which are over all heads together, see those of the other ranks."""
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    class NormOverRanks(Olmo2RMSNorm):
        """The norm of a slice of what it is over, with the slice's part of a weight that every rank holds whole.

        Communicates: one all-reduce of a number a token over the tensor-parallel group, and one in the backward pass.
        The gradient of the weight is this rank's part, which AutoTP sums (``grad_allreduce``).
        """

        def forward(self, hidden_states: Tensor) -> Tensor:
            """Normalizes [B, S, this rank's heads * D]."""
            wide, width = hidden_states.float(), self.weight.shape[0]
            shard = VocabShard.split(width, context.tp_size, context.tp_rank)
            squares = differentiable_sum(wide.square().sum(-1, keepdim=True), context.tp_group)
            normalized = wide * torch.rsqrt(squares / width + self.variance_epsilon)
            return (self.weight[shard.start : shard.stop] * normalized).to(hidden_states.dtype)

    body: Any = model.get_submodule("model")
    for layer in body.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            norm.__class__ = NormOverRanks  # in its place: the engine has hooks on it
