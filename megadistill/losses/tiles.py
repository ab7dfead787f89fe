"""What the objective and its kernels exchange.

A tile holds the logits of C tokens and this rank's Vs classes, at temperature 1; kernels temper it themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from torch import Tensor

from megadistill.config.loss import LossConfig, Remainder
from megadistill.losses.divergences import Formula, Setting, divergence_of

# Classes that share one maximum and one sum in the statistics: the top K lie in the K groups with the largest maxima.
GROUP = 64
# Softnesses between the place where an upper edge would cut its mass and its threshold: classes that are as likely as
# the one at the quantile (ties) keep 98 % and more of themselves.
UPPER_EDGE = 4.0
_MIN_GROUPED = 128 * GROUP  # below, taking the top K of the whole shard is as fast


class ClippedSum(IntEnum):
    """Sums over classes for DAC-KL; p, q: teacher and student, m: mask (docs/method.md, section 2).

    ``TileSpec.columns`` has those that a specification asks for. L and U: only with edges, and the derivative of a sum
    by a threshold, up to sign and softness. The totals belong to the student and are relative to exp(SHIFT): they merge
    like a log-sum-exp.
    """

    KL = 0
    """Sum of p (log p - log q), unclipped."""
    KEPT_GAP = 1
    """D: sum of m p (log p - log q); with log m added to the gap (truncate)."""
    KEPT_P = 2
    """P: sum of m p."""
    CLIPPED_P = 3
    """Rp: sum of (1 - m) p."""
    CLASSES = 4
    """Sum of m."""
    SHIFT = 5
    """Log of the unit of the three totals."""
    TOTAL = 6
    """Rq, the sum of (1 - m) q (bucket), or Q, the sum of m q (renormalize)."""
    TOTAL_L = 7
    TOTAL_U = 8
    GAP_L = 9
    """Sum of m p (log p - log q) (1 - lower edge's sigmoid), with log m as in KEPT_GAP."""
    P_L = 10
    """The same of m p, without the top class."""
    GAP_U = 11
    P_U = 12
    DENSITY_L = 13
    """Softness times the density of p at the lower threshold, top class left out; P_L where there is no upper one."""
    DENSITY_U = 14
    """The same at the upper threshold's quantile, ``UPPER_EDGE`` softnesses below it."""


class DivergenceSum(IntEnum):
    """Columns of the sums over classes for every other divergence; the forward KL has the first one only."""

    KL = 0
    VALUE = 1
    SLOPE = 2


class SpanSum(IntEnum):
    """Columns of the sums over classes of a span pair; r is the product of both positions' probabilities."""

    SQUARE = 0
    """||r^S - r^T||^2."""
    INNER = 1
    """<r^S - r^T, r^S>."""


@dataclass(frozen=True)
class TileSpec:
    """What a kernel is specialized on: one compiled version for each value."""

    is_clipped: bool = False
    """DAC-KL with its mask; ``formula`` is None then."""
    formula: Formula | None = None
    """The divergence; where it is None and there is no mask, the forward KL."""
    share: Setting = 0.0
    """The share or the exponents that the formula gets."""
    remainder: Remainder = "bucket"
    softness: float = 0.25
    has_upper: bool = False
    """The mask has an upper edge."""
    temperature: float = 1.0
    has_edges: bool = False
    """Sums for the derivatives by the mask's thresholds are wanted: a gate is learning."""
    has_untempered: bool = False
    """Cross-entropy at temperature 1 beside other terms at another temperature."""
    is_wide: bool = False
    """The places at which masses are asked for lie too far apart for one exponential (``edge_masses``)."""
    has_bucket: bool = False
    """The last column stands for all classes that are not listed (TeacherTopK): it is never kept."""

    @classmethod
    def of(cls, config: LossConfig, *, has_edges: bool) -> TileSpec:
        """The specification that a configuration asks for."""
        is_clipped = config.is_clipped
        divergence = divergence_of(config)
        return cls(
            is_clipped=is_clipped,
            formula=divergence.formula,
            share=divergence.share(config),
            remainder=config.remainder if is_clipped else "bucket",
            softness=config.softness if is_clipped else 0.0,
            has_upper=is_clipped and config.upper < 1,
            temperature=config.temperature,
            has_edges=has_edges,
            has_untempered=config.temperature != 1.0 and config.sft > 0,
        )

    @property
    def has_totals(self) -> bool:
        """Whether the clipped loss needs a sum over the student's side of the mask."""
        return self.remainder in ("bucket", "renormalize")

    @property
    def columns(self) -> tuple[ClippedSum, ...]:
        """The clipped loss's sums over classes, in their order."""
        absent: set[ClippedSum] = set()
        if not self.has_totals:
            absent |= {ClippedSum.SHIFT, ClippedSum.TOTAL, ClippedSum.TOTAL_L, ClippedSum.TOTAL_U}
        if not self.has_edges:
            absent |= {column for column in ClippedSum if column > ClippedSum.TOTAL}
        if not self.has_upper:
            absent |= {ClippedSum.TOTAL_U, ClippedSum.GAP_U, ClippedSum.P_U}
            absent |= {ClippedSum.DENSITY_L, ClippedSum.DENSITY_U}
        return tuple(column for column in ClippedSum if column not in absent)

    @property
    def num_sums(self) -> int:
        """Number of sums over classes: of ``columns`` or of ``DivergenceSum``."""
        if self.is_clipped:
            return len(self.columns)
        return DivergenceSum.KL + 1 if self.formula is None else len(DivergenceSum)


def group_width(num_classes: int) -> int:
    """Columns of one group of the teacher's statistics; 1: no grouping."""
    return GROUP if num_classes >= _MIN_GROUPED else 1


class LocalStatistics(NamedTuple):
    """Statistics of one shard, per token [C]; sums of exponentials are tempered and relative to the maximum.

    Attributes:
        student_max: Largest logit of the student.
        student_sum: Its sum of exponentials.
        untempered_sum: The same at temperature 1.
        teacher_max: Largest logit of the teacher; None without a teacher, like the next ones.
        teacher_sum: Its sum of exponentials.
        group_max: [C, G] largest logits of groups of classes; None where the shard is too small to be grouped.
        group_sum: [C, G] sums of exponentials of the groups, relative to the group's maximum.
    """

    student_max: Tensor
    student_sum: Tensor
    untempered_sum: Tensor | None
    teacher_max: Tensor | None
    teacher_sum: Tensor | None
    group_max: Tensor | None
    group_sum: Tensor | None


class LogNormalizers(NamedTuple):
    """What turns logits into log-probabilities, per token [C].

    For the student log q = (logit - student_max) / tau - student_log; the same for the teacher. ``untempered_log`` is
    ``student_log`` at temperature 1; ``share`` is what the formula gets where tokens differ in ``TileSpec.share``.
    """

    student_max: Tensor
    student_log: Tensor
    untempered_log: Tensor | None = None
    teacher_max: Tensor | None = None
    teacher_log: Tensor | None = None
    share: Tensor | None = None


class EdgeNodes(NamedTuple):
    """Places [C, D] on the scale of log p at which the search for a threshold asks for masses, ascending in mass.

    Attributes:
        lower: Rising; asked for is the mass that a lower edge there cuts.
        upper: Falling; asked for is the mass that an upper edge there cuts. None: no upper edge.
    """

    lower: Tensor
    upper: Tensor | None


class MaskBounds(NamedTuple):
    """The mask's place, per token [C].

    Attributes:
        theta_l: Lower threshold of log p, in nats.
        theta_u: Upper threshold; not read without ``TileSpec.has_upper``.
        top_column: The teacher's top class as a column of this tile; outside it where another shard has the class.
    """

    theta_l: Tensor
    theta_u: Tensor
    top_column: Tensor


@dataclass
class SpanPairs:
    """The span pairs of one chunk, and what a backend keeps of them for the derivative.

    Attributes:
        is_pair: [C] bool, whether a position starts a pair; the last entry is not read. The same on all shards.
        is_kept: Whether anything may be kept.
        is_empty: Whether there is known to be no pair.
        row: [C] the pair's row in ``kept_PVs``; 0 where a position starts none. None: nothing was kept.
        kept_PVs: (r^S - r^T) r^S of each pair and class. The memory serves the next chunk, too.
    """

    is_pair: Tensor
    is_kept: bool = True
    is_empty: bool = False
    row: Tensor | None = None
    kept_PVs: Tensor | None = None


class GradientWeights(NamedTuple):
    """Factors [C] of the parts of the derivative by a token's logits; None: that part is absent.

    Attributes:
        student: Factor of q.
        teacher: Factor of -m p (clipped), -p (forward KL) or the divergence's slope.
        bucket_coef: Factor of the mask's weight of q over exp(log_norm).
        log_norm: See ``bucket_coef``.
        untempered: Factor of softmax(student) at temperature 1.
        label: What is subtracted at ``label_column``.
        label_column: The label as a column of this tile; outside it where another shard has the class.
        span_pair: Weight over root of the span pair that a position starts (the last one starts none).
        span_inner: The pair's merged <r^S - r^T, r^S>.
    """

    student: Tensor
    teacher: Tensor | None = None
    bucket_coef: Tensor | None = None
    log_norm: Tensor | None = None
    untempered: Tensor | None = None
    label: Tensor | None = None
    label_column: Tensor | None = None
    span_pair: Tensor | None = None
    span_inner: Tensor | None = None
