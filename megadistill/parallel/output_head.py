"""This rank's slice of a model's output head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from megadistill.parallel.vocab import VocabShard


@dataclass(frozen=True)
class OutputHead:
    """Weight [Vs, H] and bias [Vs] (or None) of the head, Vs being the classes of ``shard``: logits are
    ``hidden @ weight.T + bias``."""

    weight: Tensor
    bias: Tensor | None
    shard: VocabShard

    @classmethod
    def of(cls, module: nn.Module, shard: VocabShard) -> OutputHead:
        """The head in a linear layer whose parameters are present."""
        return cls(module.weight, getattr(module, "bias", None), shard)  # type: ignore[arg-type]
