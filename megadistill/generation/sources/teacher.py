"""Mode ``teacher``: the teacher's own text (sequence-level distillation, SeqKD), written once before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from megadistill.data.sample import Sample, TokenIds
from megadistill.decoding.nonfinite import row_name
from megadistill.decoding.protocols import TextModel
from megadistill.generation.sources.base import CacheNeeds, SourceInputs, TextSource
from megadistill.generation.teacher_cache import teacher_responses
from megadistill.generation.teacher_states import with_teacher_states
from megadistill.observability.timers import Timers


class TeacherText(TextSource):
    """The teacher's response to each prompt, from ``responses``."""

    kind = "teacher"
    student_share = 0.0

    def __init__(
        self, responses: Mapping[TokenIds, TokenIds], teacher: TextModel | None, examples_per_pass: int
    ) -> None:
        self._responses, self._teacher, self._examples_per_pass = responses, teacher, examples_per_pass

    @classmethod
    def cache_needs(cls) -> CacheNeeds:
        """The teacher's, before training."""
        return CacheNeeds("teacher", is_offline=True)

    @classmethod
    def build(cls, inputs: SourceInputs) -> TeacherText:
        """Reads the responses from the file, and lets the teacher write those that are missing."""
        assert inputs.teacher is not None and inputs.teacher_folder is not None
        responses = teacher_responses(
            inputs.config,
            [example.prompt_ids for example in inputs.examples],
            inputs.teacher,
            inputs.teacher_folder,
            inputs.context,
            eos_ids=inputs.teacher_eos_ids,
            batch_size=inputs.decode_plan.batch_size,
            name_of=lambda prompt: row_name(next(row for row in inputs.examples if row.prompt_ids == prompt)),
        )
        reader = inputs.teacher if inputs.config.loss.uses_teacher else None
        return cls(responses, reader, inputs.config.train.micro_batch_size)

    def samples(self, step: int, batch: Sequence[Sample], timers: Timers) -> list[Sample]:
        """The teacher's responses, read by the teacher where a loss compares with it."""
        samples = [replace(sample, response_ids=self._responses[sample.prompt_ids]) for sample in batch]
        with timers("teacher"):
            return with_teacher_states(samples, self._teacher, self._examples_per_pass)


SOURCE = TeacherText
