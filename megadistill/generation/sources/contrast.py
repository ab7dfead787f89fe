"""Mode ``contrast``: the teacher's and the student's text of every prompt, two rows with token losses of their own.

DistiLLM-2 (Ko et al., arXiv 2503.07067): the student is drawn to the teacher's text and pushed off its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megadistill.data.sample import RowLoss, Sample
from megadistill.generation.scoring import mean_probabilities
from megadistill.generation.sources.base import CacheNeeds, SourceInputs, TextSource
from megadistill.generation.sources.on_policy import OnPolicy
from megadistill.generation.sources.teacher import TeacherText
from megadistill.generation.teacher_states import states_of
from megadistill.observability.timers import Timers

# Of the released code: the least skew, and what is added to a difference of probabilities that divides.
LEAST_SKEW, _EPS = 0.01, 1e-5


def adaptive_skew(gap: float, mean_gap: float, skew: float) -> float:
    """The share a of a row's mixture for which (1 - a) gap is as large as (1 - skew) mean_gap, in [0.01, skew].

    Args:
        gap: What the text's writer has more of the mean probability of a token than the other model.
        mean_gap: Its mean over the batch.
        skew: ``loss.skew``.
    """
    divisor = gap + _EPS
    if divisor == 0:
        return skew
    return min(max(1 - (1 - skew) * mean_gap / divisor, LEAST_SKEW), skew)


class Contrast(TextSource):
    """The teacher's rows, then the student's.

    Args:
        inputs: What the sources were built from.
        student: Student text of this step.
        teacher: The teacher's text, written before training.
    """

    kind = "contrast"
    student_share = 0.5

    def __init__(self, inputs: SourceInputs, student: TextSource, teacher: TextSource) -> None:
        self._inputs, self._student, self._teacher = inputs, student, teacher
        self._metrics: dict[str, float] = {}

    @classmethod
    def cache_needs(cls) -> CacheNeeds:
        """The student's and the teacher's, though not at the same time: as many rows are written by either."""
        return CacheNeeds("student", is_written_by_both=True)

    @classmethod
    def build(cls, inputs: SourceInputs) -> Contrast:
        """Both sources; the teacher writes what its file lacks."""
        return cls(inputs, OnPolicy.build(inputs), TeacherText.build(inputs))

    def samples(self, step: int, batch: Sequence[Sample], timers: Timers) -> list[Sample]:
        """Twice as many samples as the batch has; the reference of a prompt stays with the teacher's row."""
        written = self._student.samples(step, batch, timers)
        students = [replace(sample, reference_ids=None) for sample in written]
        rows = [*self._teacher.samples(step, batch, timers), *students]
        loss = self._inputs.config.loss
        if loss.dac_kl == 0:
            return rows
        skews: Sequence[float | None] = [None] * len(rows)
        if loss.adaptive_skew:
            with timers("score"):
                skews = self._skews(rows)
        weight = self._student_weight(step)
        of_teacher = loss.divergence_teacher_text or loss.divergence
        losses = [
            RowLoss(of_teacher, skew, 2 - weight) if i < len(batch) else RowLoss(loss.divergence, skew, weight)
            for i, skew in enumerate(skews)
        ]
        return [replace(row, row_loss=own) for row, own in zip(rows, losses, strict=True)]

    def _student_weight(self, step: int) -> float:
        """1 at first, ``loss.student_text_weight`` from the middle of the run on."""
        rise = self._inputs.config.loss.student_text_weight - 1
        weight = 1 + rise * min(1.0, 2 * step / self._inputs.max_steps)
        if rise:
            self._metrics["contrast/student_weight"] = weight
        return weight

    def _skews(self, rows: Sequence[Sample]) -> list[float]:
        """A skew for each row, from all rows of the global batch.

        The student reads all rows, which gathers its parameters layer by layer, and both heads are gathered once. Two
        all-reduces of a few numbers over the data-parallel group.
        """
        inputs, half = self._inputs, len(rows) // 2
        config, teacher = inputs.config, inputs.teacher
        assert teacher is not None
        texts = [row.response_ids or () for row in rows]
        probabilities = []
        own = states_of(rows, inputs.student, config.train.micro_batch_size)
        for model, hidden in ((teacher, [row.teacher_hidden for row in rows]), (inputs.student, own)):
            known = [states for states in hidden if states is not None]
            assert len(known) == len(rows)
            with model.head() as head:
                probabilities.append(mean_probabilities(texts, known, head, backend=config.loss.backend))
        gaps = [p - q if i < half else q - p for i, (p, q) in enumerate(zip(*probabilities, strict=True))]
        device = inputs.context.device
        local = torch.tensor([sum(gaps[:half]), sum(gaps[half:]), half], dtype=torch.float64, device=device)
        of_teacher, of_student, number = inputs.context.sum_over_dp(local).tolist()
        means = [of_teacher / number] * half + [of_student / number] * half
        skews = [adaptive_skew(gap, mean, config.loss.skew) for gap, mean in zip(gaps, means, strict=True)]
        local = torch.tensor([sum(skews[:half]), sum(skews[half:])], dtype=torch.float64, device=device)
        totals = inputs.context.sum_over_dp(local).tolist()
        for side, total in zip(("teacher", "student"), totals, strict=True):
            self._metrics[f"contrast/{side}_skew"] = total / number
        return skews

    def metrics(self) -> dict[str, float]:
        """Mean skews of either text, and the weight of the student's where it moves."""
        return dict(self._metrics)


SOURCE = Contrast
