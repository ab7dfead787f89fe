"""What the objective and its row kernels say to each other.

A tile holds the logits of C rows and this rank's V classes, at temperature 1; kernels temper it themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from megadistill.losses.config import Baseline, LossConfig, Remainder

Kind = Literal["clipped", Baseline]
# Classes that share one maximum and one sum in the statistics: the top K lie in the K groups with the largest maxima.
GROUP = 64
_MIN_GROUPED = 128 * GROUP  # below, taking the top K of the row itself is as fast


@dataclass(frozen=True)
class TileSpec:
    """What a kernel is specialised on: one compiled version for each value."""

    kind: Kind = "forward_kl"
    remainder: Remainder = "bucket"
    softness: float = 0.25
    temperature: float = 1.0
    mix: float = 0.5
    """alpha of the skewed divergences, beta of Jensen-Shannon's."""
    has_edges: bool = False
    """Row sums for the derivatives by the mask's thresholds are wanted: a gate is learning."""
    has_plain: bool = False
    """Cross-entropy at temperature 1 beside other terms at another temperature."""
    has_bucket: bool = False
    """The last column stands for all classes that are not listed (TeacherTopK): it is never kept."""

    @classmethod
    def of(cls, config: LossConfig, *, has_edges: bool) -> TileSpec:
        """The specification that a configuration asks for."""
        kind: Kind = "forward_kl"
        if config.dac_kl > 0:
            kind = "clipped" if config.is_clipped else "forward_kl"
            if config.divergence != "dac_kl":
                kind = config.divergence
        mix = config.jensen_shannon_beta if kind == "jensen_shannon" else config.skew
        return cls(
            kind=kind,
            remainder=config.remainder if kind == "clipped" else "bucket",
            softness=config.softness if kind == "clipped" else 0.0,
            temperature=config.temperature,
            mix=mix if kind not in ("clipped", "forward_kl", "reverse_kl", "total_variation") else 0.0,
            has_edges=has_edges,
            has_plain=config.temperature != 1.0 and config.sft > 0,
        )

    @property
    def num_sums(self) -> int:
        """Columns of the row sums; the last ones of a clipped loss merge like a log-sum-exp."""
        if self.kind == "clipped":
            return 12 if self.has_edges else 6
        return 1 if self.kind == "forward_kl" else 3


def group_width(num_classes: int) -> int:
    """Columns of one group of the teacher's statistics; 1: no grouping."""
    return GROUP if num_classes >= _MIN_GROUPED else 1


class LocalStatistics(NamedTuple):
    """Statistics of one shard, per row [C]; sums of exponentials are tempered and relative to the maximum.

    group_max, group_sum: [C, G] of the teacher's groups, sums relative to the group's own maximum; None where the
    shard is too small to be grouped. The teacher's entries are None without a teacher.
    """

    student_max: Tensor
    student_sum: Tensor
    plain_sum: Tensor | None
    teacher_max: Tensor | None
    teacher_sum: Tensor | None
    group_max: Tensor | None
    group_sum: Tensor | None


class RowConstants(NamedTuple):
    """What a kernel needs to know of each row [C]: log q = (student - student_max) / tau - student_log, and so on.

    plain_log is student_log at temperature 1. theta_l, theta_u: thresholds of the mask in nats; top_column: the
    teacher's top class as a column of this tile, outside it when elsewhere.
    """

    student_max: Tensor
    student_log: Tensor
    plain_log: Tensor | None = None
    teacher_max: Tensor | None = None
    teacher_log: Tensor | None = None
    theta_l: Tensor | None = None
    theta_u: Tensor | None = None
    top_column: Tensor | None = None


class RowWeights(NamedTuple):
    """Factors [C] of the parts of the derivative by a row's logits; None: that part is absent.

    student: of q; teacher: of -m p (clipped), -p (forward KL) or the divergence's slope; share: of the mask's weight of
    q over exp(log_norm); plain: of softmax(student) at temperature 1. label: what the derivative loses at label_column
    (a column of this tile, outside it when elsewhere). span_pair: weight over root of the span pair that a row starts
    (the last row starts none), span_inner: its merged <r^S - r^T, r^S>.
    """

    student: Tensor
    teacher: Tensor | None = None
    share: Tensor | None = None
    log_norm: Tensor | None = None
    plain: Tensor | None = None
    label: Tensor | None = None
    label_column: Tensor | None = None
    span_pair: Tensor | None = None
    span_inner: Tensor | None = None
