from megadistill.losses.config import IGNORE_INDEX, LossConfig
from megadistill.losses.cross_entropy import cross_entropy
from megadistill.losses.head import Head
from megadistill.losses.objective import DistillOutput, distill_loss
from megadistill.losses.quantile_gate import QuantileGate
from megadistill.losses.token_kl import token_kl
from megadistill.losses.topk_teacher import TeacherTopK

__all__ = [
    "IGNORE_INDEX",
    "DistillOutput",
    "Head",
    "LossConfig",
    "QuantileGate",
    "TeacherTopK",
    "cross_entropy",
    "distill_loss",
    "token_kl",
]
