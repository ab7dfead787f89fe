"""A text source of your own: here student text with its second half cut off, before the teacher reads it.

PYTHONPATH=docs/examples megadistill train --config configs/smoke.yaml generation.source=text_source:FirstHalf
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import megadistill
from megadistill.decoding.rollout import rollout
from megadistill.decoding.sampling import Sampling
from megadistill.generation.sources.base import CacheNeeds
from megadistill.generation.teacher_states import with_teacher_states
from megadistill.observability.timers import Timers


class FirstHalf(megadistill.TextSource):
    """The first half of what the student writes. Every rank makes the same calls, whatever its examples look like."""

    kind = "first_half"  # metrics.jsonl counts such steps as text/first_half
    student_share = 1.0

    def __init__(self, inputs: megadistill.SourceInputs) -> None:
        self._inputs = inputs

    @classmethod
    def build(cls, inputs: megadistill.SourceInputs) -> FirstHalf:
        """The source of a run."""
        return cls(inputs)

    @classmethod
    def cache_needs(cls) -> CacheNeeds:
        """The student writes."""
        return CacheNeeds("student")

    def samples(self, step: int, batch: Sequence[megadistill.Sample], timers: Timers) -> list[megadistill.Sample]:
        """This rank's samples of a step: responses, and the teacher's hidden states of them."""
        inputs = self._inputs
        with timers("rollout"), inputs.student.decoder() as decoder:
            written = rollout(
                decoder, batch, limits=[inputs.response_limit(len(sample.prompt_ids)) for sample in batch],
                eos_ids=inputs.eos_ids, sampling=Sampling(inputs.config.run.seed),
                max_examples=inputs.decode_plan.batch_size,
            )  # fmt: skip
        halves = [
            replace(sample, response_ids=ids[: (len(ids) + 1) // 2]) for sample, ids in zip(batch, written, strict=True)
        ]
        with timers("teacher"):
            return with_teacher_states(halves, inputs.teacher, inputs.config.train.micro_batch_size)
