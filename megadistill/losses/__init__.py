"""The objective: cross-entropy, DAC-KL and its baselines, span term and gate, on vocabulary shards."""

from megadistill.config.loss import LossConfig
from megadistill.losses.cross_entropy import cross_entropy, label_nats
from megadistill.losses.fused import IGNORE_INDEX
from megadistill.losses.gate_objective import virtual_step
from megadistill.losses.head import Head
from megadistill.losses.objective import distill_loss
from megadistill.losses.output import METRIC_NAMES, DistillOutput
from megadistill.losses.quantile_gate import QuantileGate
from megadistill.losses.token_kl import label_scores, token_kl
from megadistill.losses.topk_teacher import TeacherTopK

__all__ = [
    "IGNORE_INDEX",
    "METRIC_NAMES",
    "DistillOutput",
    "Head",
    "LossConfig",
    "QuantileGate",
    "TeacherTopK",
    "cross_entropy",
    "distill_loss",
    "label_nats",
    "label_scores",
    "token_kl",
    "virtual_step",
]
