"""Mode ``on_policy``: the student writes, the teacher corrects the worst token, the student continues.

That is sequence correction and re-generation (SCRG; paper, Eq. 3-4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megadistill.config.sampling import SamplingOptions
from megadistill.config.schema import GenerationSection
from megadistill.data.sample import NO_ERROR, Sample, TokenIds
from megadistill.decoding.protocols import Decoder, TextModel
from megadistill.decoding.rollout import RolloutState
from megadistill.decoding.sampling import Sampling
from megadistill.generation.scoring import TeacherScores, score_responses
from megadistill.generation.sources.base import CacheNeeds, SourceInputs, TextSource
from megadistill.generation.teacher_states import TeacherStates
from megadistill.observability.timers import Timers
from megadistill.parallel.output_head import OutputHead
from megadistill.parallel.rng import Stream


class OnPolicy(TextSource):
    """Student text of this step, corrected by the teacher where ``generation.scrg.enabled`` is true."""

    kind = "generate"
    student_share = 1.0

    def __init__(self, inputs: SourceInputs, teacher: TextModel) -> None:
        self._inputs, self._student, self._teacher = inputs, inputs.student, teacher

    @classmethod
    def cache_needs(cls) -> CacheNeeds:
        """The student's, with the teacher's beside it."""
        return CacheNeeds("student", is_scored=True)

    @classmethod
    def build(cls, inputs: SourceInputs) -> OnPolicy:
        """A source with a teacher, which every mode with student text has."""
        assert inputs.teacher is not None
        return cls(inputs, inputs.teacher)

    def samples(self, step: int, batch: Sequence[Sample], timers: Timers) -> list[Sample]:
        """Writes and corrects as many samples at a time as the cache may hold.

        The student's parameters are gathered once for writing, scoring and re-generation. Every rank has the same
        number of samples, hence of decode batches and of calls of the teacher, which gather its parameters.
        """
        size = self._inputs.decode_plan.batch_size
        with self._student.decoder() as decoder:
            batches = [self._write(batch[i : i + size], decoder, timers) for i in range(0, len(batch), size)]
        return [sample for decode_batch in batches for sample in decode_batch]

    def _write(self, samples: Sequence[Sample], decoder: Decoder, timers: Timers) -> list[Sample]:
        """One decode batch. Every rank runs all rounds, whatever its samples look like, because scoring communicates.

        Each later round looks only to the right of the last correction (ours), so that rounds cannot undo each other.
        """
        config, generation = self._inputs.config, self._inputs.config.generation
        num_rounds = generation.scrg.rounds if generation.scrg.enabled else 0
        prompts = [sample.prompt_ids for sample in samples]
        limits = [self._inputs.response_limit(len(prompt)) for prompt in prompts]
        rollout = RolloutState(
            decoder, samples, limits=limits, eos_ids=self._inputs.eos_ids,
            sampling=_sampling(generation, config.run.seed), keep_hidden=num_rounds > 0,
        )  # fmt: skip
        teacher_states = TeacherStates(
            self._teacher.prefiller(config.train.micro_batch_size),
            prompts,
            max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)),
            keep_cache=num_rounds > 0 and self._inputs.decode_plan.keeps_teacher_cache,
        )
        # The student writes.
        with timers("rollout"):
            rollout.write(Stream.ROLLOUT)
        rollouts = responses = rollout.responses()
        starts = [0] * len(samples)  # first response position that is not yet read and scored
        error_positions, num_corrections = [NO_ERROR] * len(samples), [0] * len(samples)
        for round_index in range(num_rounds):
            # The teacher reads what is new.
            with timers("teacher"):
                teacher_states.update(responses, starts)
            # Where do they disagree most, and what would the teacher have written there?
            with timers("score"):
                scores = self._score(samples, responses, starts, rollout, decoder.head, teacher_states, round_index)
                corrections = self._inputs.find_corrections(responses, scores)
            # Its token goes in, and the student continues from there.
            with timers("regenerate"):
                rollout.rewrite(corrections, Stream.CONTINUATION + round_index, self._inputs.teacher_eos_ids)
                responses = rollout.responses()
            # A response without an error is unchanged, and later rounds no longer look at it (ours).
            starts = [len(response) for response in responses]
            for i, position, _ in corrections:
                if error_positions[i] == NO_ERROR:
                    error_positions[i] = position
                starts[i], num_corrections[i] = position + 1, num_corrections[i] + 1
        # The teacher reads what the last round has changed; without correction, everything.
        with timers("teacher"):
            teacher_states.update(responses, starts)
        return [
            replace(
                sample,
                rollout_ids=rollouts[i],
                response_ids=responses[i],
                teacher_hidden=teacher_states.hidden[i],
                error_position=error_positions[i],
                num_corrections=num_corrections[i],
                is_finite=i not in rollout.nonfinite,
            )
            for i, sample in enumerate(samples)
        ]

    def _score(
        self,
        samples: Sequence[Sample],
        responses: Sequence[TokenIds],
        starts: Sequence[int],
        rollout: RolloutState,
        student_head: OutputHead,
        teacher_states: TeacherStates,
        round_index: int,
    ) -> TeacherScores:
        """Compares student and teacher from ``starts[i]`` on in each response."""
        config = self._inputs.config
        return score_responses(
            [len(response) for response in responses],
            starts,
            [sample.sequence_id for sample in samples],
            student_hidden=[rollout.hidden(i, start) for i, start in enumerate(starts)],
            student_head=student_head,
            teacher_hidden=[teacher_states.hidden_from(i, start) for i, start in enumerate(starts)],
            teacher=self._teacher,
            seed=config.run.seed,
            round_index=round_index,
            sample_teacher=config.generation.scrg.teacher_token == "sample",
            backend=config.loss.backend,
        )


def _sampling(generation: GenerationSection, seed: int) -> Sampling:
    return Sampling(seed, generation.sampling_temperature, SamplingOptions.of(generation))


SOURCE = OnPolicy
