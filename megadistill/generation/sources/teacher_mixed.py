"""Mode ``teacher_mixed``: every token is drawn from a mixture of teacher and student (MiniLLM, arXiv 2306.08543)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megadistill.config.sampling import SamplingOptions
from megadistill.data.sample import Sample
from megadistill.decoding.mixture import MixtureDecoder, MixtureDrawer
from megadistill.decoding.protocols import TextModel
from megadistill.decoding.rollout import RolloutState
from megadistill.decoding.sampling import Sampling
from megadistill.generation.sources.base import CacheNeeds, SourceInputs, TextSource
from megadistill.generation.teacher_states import with_teacher_states
from megadistill.observability.log import get_logger
from megadistill.observability.timers import Timers
from megadistill.parallel.rng import Stream


class TeacherMixed(TextSource):
    """Text of a p + (1 - a) q, a = ``generation.teacher_share``; both models write side by side."""

    kind = "generate"
    student_share = 1.0

    def __init__(self, inputs: SourceInputs, teacher: TextModel) -> None:
        self._inputs, self._student, self._teacher = inputs, inputs.student, teacher

    @classmethod
    def cache_needs(cls) -> CacheNeeds:
        """Both models'."""
        return CacheNeeds("student", is_written_by_both=True)

    @classmethod
    def build(cls, inputs: SourceInputs) -> TeacherMixed:
        """A source with a teacher, which every mode with student text has."""
        assert inputs.teacher is not None
        if inputs.context.device.type == "cuda" and inputs.config.generation.cuda_graphs:
            get_logger(inputs.context.rank, "generation").info(
                "generation.cuda_graphs=true has no effect with generation.mode=teacher_mixed: the steps of two models "
                "are not recorded"
            )
        return cls(inputs, inputs.teacher)

    def samples(self, step: int, batch: Sequence[Sample], timers: Timers) -> list[Sample]:
        """Both models write; then the teacher reads what they wrote."""
        with timers("rollout"):
            samples = self._written(batch)
        config = self._inputs.config
        reader = self._teacher if config.loss.uses_teacher else None
        with timers("teacher"):
            return with_teacher_states(samples, reader, config.train.micro_batch_size)

    def _written(self, batch: Sequence[Sample]) -> list[Sample]:
        """Writes as many samples at a time as both caches may hold.

        Both models' parameters are gathered once, and nothing of their decoders is left. Every rank has the same number
        of decode batches.
        """
        size = self._inputs.decode_plan.batch_size
        with self._student.decoder() as student, self._teacher.decoder() as teacher:
            decoder = MixtureDecoder(student, teacher)
            batches = [self._write(batch[i : i + size], decoder) for i in range(0, len(batch), size)]
        return [sample for decode_batch in batches for sample in decode_batch]

    def _write(self, samples: Sequence[Sample], decoder: MixtureDecoder) -> list[Sample]:
        inputs, generation, seed = self._inputs, self._inputs.config.generation, self._inputs.config.run.seed
        sampling = Sampling(seed, generation.sampling_temperature, SamplingOptions.of(generation))
        state = RolloutState(
            decoder, samples, limits=[inputs.response_limit(len(sample.prompt_ids)) for sample in samples],
            eos_ids=inputs.eos_ids | inputs.teacher_eos_ids, sampling=sampling,
            drawer=MixtureDrawer(decoder.shard, sampling, len(samples), generation.teacher_share),
        )  # fmt: skip
        state.write(Stream.ROLLOUT)
        return [
            replace(sample, rollout_ids=response, response_ids=response, is_finite=i not in state.nonfinite)
            for i, (sample, response) in enumerate(zip(samples, state.responses(), strict=True))
        ]


SOURCE = TeacherMixed
