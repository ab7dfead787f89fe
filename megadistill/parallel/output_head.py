"""This rank's slice of a model's output head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megadistill.parallel.vocab import VocabShard


@dataclass(frozen=True)
class LogitMap:
    """What a family does with the products of its head: logits are ``cap * tanh(factor * products / cap)``.

    Attributes:
        factor: Granite's 1 / ``logits_scaling``.
        cap: Gemma's ``final_logit_softcapping``; None: logits are not bounded.
    """

    factor: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitMap:
        """Of a transformers configuration, whose families name these settings alike."""
        return cls(
            float(getattr(config, "logit_scale", None) or 1) / float(getattr(config, "logits_scaling", None) or 1),
            getattr(config, "final_logit_softcapping", None),
        )

    @property
    def is_identity(self) -> bool:
        """Logits are the products."""
        return self.factor == 1 and self.cap is None

    def apply_(self, products: Tensor) -> Tensor:
        """The logits, in place of the products."""
        if self.cap is None:
            return products if self.factor == 1 else products.mul_(self.factor)
        return products.mul_(self.factor / self.cap).tanh_().mul_(self.cap)

    def slope(self, logits: Tensor) -> Tensor:
        """The derivative of logits by products."""
        if self.cap is None:
            return logits.new_tensor(self.factor)
        return torch.square(logits / self.cap).neg_().add_(1).mul_(self.factor)


IDENTITY = LogitMap()


@dataclass(frozen=True)
class OutputHead:
    """The head: logits are ``hidden @ weight.T + bias``, after ``logit_map``.

    Attributes:
        weight: [Vs, H].
        bias: [Vs], or None.
        shard: This rank's slice of the vocabulary, which has Vs classes.
        logit_map: What becomes of the products.
    """

    weight: Tensor
    bias: Tensor | None
    shard: VocabShard
    logit_map: LogitMap = IDENTITY

    @classmethod
    def of(cls, module: nn.Module, shard: VocabShard, logit_map: LogitMap = IDENTITY) -> OutputHead:
        """The head in a linear layer whose parameters are present."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        return cls(weight, getattr(module, "bias", None), shard, logit_map)
