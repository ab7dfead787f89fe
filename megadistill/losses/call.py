"""What one call of the objective gets beside the student."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megadistill.config.loss import LossConfig
from megadistill.errors import ConfigError
from megadistill.losses.fused import Normalizer, check_labels, check_shard, check_skews, check_weights
from megadistill.losses.head import Head
from megadistill.losses.topk_teacher import TeacherTopK
from megadistill.parallel.output_head import OutputHead
from megadistill.parallel.vocab import VocabShard


@dataclass(frozen=True)
class Call:
    """Arguments that get no gradient; ``distill_loss`` explains them."""

    teacher: Head | TeacherTopK
    labels: Tensor
    pair_mask: Tensor
    gate: nn.Module | None
    config: LossConfig
    shard: VocabShard
    num_tokens: Normalizer
    num_pairs: Normalizer
    token_weights: Tensor | None
    rows: Tensor | None
    teacher_share: float
    skews: Tensor | None = None
    ahead: OutputHead | None = None
    interpolation: float = 1.0
    temperatures: Tensor | None = None

    def check(self, student: Head) -> None:
        """Raises ValueError or ConfigError for arguments that do not fit together."""
        shard, length, teacher, pair_mask = self.shard, len(self.labels), self.teacher, self.pair_mask
        check_shard(shard)
        student.check("student", length, shard.size)
        if isinstance(teacher, TeacherTopK):
            teacher.check(length, self.config)
        else:
            teacher.check("teacher", length, shard.size)
        check_labels(self.labels)
        if pair_mask.shape != self.labels.shape or pair_mask.dtype != torch.bool:
            raise ValueError(
                f"pair_mask must be bool of shape ({length},), got {pair_mask.dtype} {tuple(pair_mask.shape)}"
            )
        check_weights(self.token_weights, length)
        check_skews(self.skews, length, self.config)
        self._check_interpolation()
        self._check_temperatures()

    def _check_interpolation(self) -> None:
        if not 0 <= self.interpolation <= 1:
            raise ValueError(f"interpolation must be a number from 0 to 1, got {self.interpolation!r}")
        if self.interpolation == 1:
            return
        if isinstance(self.teacher, TeacherTopK):
            raise ConfigError("a teacher of top classes has no logits to interpolate with the student's (loss.taid)")
        if self.ahead is not None:
            raise ConfigError("loss.gate_objective=student looks ahead with the teacher itself (loss.taid)")
        if self.config.policy > 0:
            raise ConfigError("loss.policy rewards by the teacher itself, not by one between it and the student")

    def _check_temperatures(self) -> None:
        if self.temperatures is None:
            return
        config, length = self.config, len(self.labels)
        if self.temperatures.shape != (length,):
            raise ValueError(f"temperatures must have shape ({length},), got {tuple(self.temperatures.shape)}")
        if isinstance(self.teacher, TeacherTopK):
            raise ConfigError("a teacher of top classes has one temperature, not one for each token (loss.adakd)")
        if config.is_clipped or any((config.sft, config.span, config.policy)):
            raise ConfigError("temperatures of tokens are for the token loss without a mask, alone (loss.adakd)")
