"""This rank's slice of a model's output head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from megadistill.parallel.vocab import VocabShard


@dataclass(frozen=True)
class OutputHead:
    """The head: logits are ``hidden @ weight.T + bias``.

    Attributes:
        weight: [Vs, H].
        bias: [Vs], or None.
        shard: This rank's slice of the vocabulary, which has Vs classes.
    """

    weight: Tensor
    bias: Tensor | None
    shard: VocabShard

    @classmethod
    def of(cls, module: nn.Module, shard: VocabShard) -> OutputHead:
        """The head in a linear layer whose parameters are present."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        return cls(weight, getattr(module, "bias", None), shard)
