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
from megadistill.decoding.rollout import Correction, RolloutState
from megadistill.decoding.sampling import Sampling
from megadistill.generation.scoring import TeacherScores, score_responses
from megadistill.generation.scrg import ErrorRule
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

    @property
    def rule(self) -> ErrorRule | None:
        """Which token is corrected; None where the text stays the student's."""
        scrg = self._inputs.config.generation.scrg
        return ErrorRule.of(scrg) if scrg.enabled else None

    def goes_on(self, round_index: int, has_text: bool) -> bool:
        """Whether there is another round, the same on every rank.

        Args:
            round_index: The round, 0-based.
            has_text: Whether this rank has text that no round has looked at.
        """
        return round_index < self._inputs.config.generation.scrg.rounds

    def streams(self, round_index: int) -> tuple[int, int]:
        """Names of a round's random numbers: those of the teacher's tokens and of the student's new text."""
        return Stream.TEACHER_TOKEN + round_index, Stream.CONTINUATION + round_index

    def _write(self, samples: Sequence[Sample], decoder: Decoder, timers: Timers) -> list[Sample]:
        """One decode batch. Every rank runs all rounds, whatever its samples look like, because scoring communicates.

        Each later round looks only to the right of the last correction (ours), so that rounds cannot undo each other.
        """
        config, rule = self._inputs.config, self.rule
        prompts = [sample.prompt_ids for sample in samples]
        limits = [self._inputs.response_limit(len(prompt)) for prompt in prompts]
        rollout = RolloutState(
            decoder, samples, limits=limits, eos_ids=self._inputs.eos_ids,
            sampling=_sampling(config.generation, config.run.seed), keep_hidden=rule is not None,
        )  # fmt: skip
        teacher_states = TeacherStates(
            self._teacher.prefiller(config.train.micro_batch_size),
            prompts,
            max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)),
            keep_cache=rule is not None and self._inputs.decode_plan.keeps_teacher_cache,
        )
        # The student writes.
        with timers("rollout"):
            rollout.write(Stream.ROLLOUT)
        texts = _Texts(rollout.responses())
        round_index = 0
        while rule is not None and self.goes_on(round_index, texts.has_unread):
            # The teacher reads what is new.
            with timers("teacher"):
                teacher_states.update(texts.responses, texts.starts)
            # Where do they disagree most, and what would the teacher have written there?
            with timers("score"):
                scores = self._score(samples, texts, rollout, decoder.head, teacher_states, rule, round_index)
                corrections = self._inputs.find_corrections(texts.responses, scores, rule)
            # Its token goes in, and the student continues from there.
            with timers("regenerate"):
                texts.take(corrections, self._corrected(texts, corrections, rollout, round_index))
            round_index += 1
        # The teacher reads what the last round has changed; without correction, everything.
        with timers("teacher"):
            if config.loss.uses_teacher:
                teacher_states.update(texts.responses, texts.starts)
        return [
            replace(
                sample,
                rollout_ids=texts.rollouts[i],
                response_ids=texts.responses[i],
                teacher_hidden=teacher_states.hidden[i] if config.loss.uses_teacher else None,
                error_position=texts.error_positions[i],
                num_corrections=texts.num_corrections[i],
                is_finite=i not in rollout.nonfinite,
            )
            for i, sample in enumerate(samples)
        ]

    def _corrected(
        self, texts: _Texts, corrections: Sequence[Correction], rollout: RolloutState, round_index: int
    ) -> list[TokenIds]:
        """The responses with the teacher's tokens, and what follows them (``generation.scrg.after``)."""
        after, ends = self.after, self._inputs.teacher_eos_ids
        if after == "keep":
            return texts.replaced(corrections, ends | self._inputs.eos_ids)
        if after == "cut":  # as if each of these tokens ended the teacher's text
            ends = frozenset(correction.token for correction in corrections)
        rollout.rewrite(corrections, self.streams(round_index)[1], ends)
        return rollout.responses()

    @property
    def after(self) -> str:
        """What follows a correction."""
        return self._inputs.config.generation.scrg.after

    def _score(
        self,
        samples: Sequence[Sample],
        texts: _Texts,
        rollout: RolloutState,
        student_head: OutputHead,
        teacher_states: TeacherStates,
        rule: ErrorRule,
        round_index: int,
    ) -> TeacherScores:
        """Compares student and teacher from ``texts.starts[i]`` on in each response."""
        config, starts = self._inputs.config, texts.starts
        scrg = config.generation.scrg
        teachers = Sampling(config.run.seed, scrg.teacher_temperature, SamplingOptions(top_p=scrg.teacher_top_p))
        return score_responses(
            [len(response) for response in texts.responses],
            starts,
            [sample.sequence_id for sample in samples],
            student_hidden=[rollout.hidden(i, start) for i, start in enumerate(starts)],
            student_head=student_head,
            teacher_hidden=[teacher_states.hidden_from(i, start) for i, start in enumerate(starts)],
            teacher=self._teacher,
            seed=config.run.seed,
            stream=self.streams(round_index)[0],
            sampling=teachers if scrg.teacher_token == "sample" else None,
            texts=texts.responses if rule.reads_text else None,
            backend=config.loss.backend,
        )


class _Texts:
    """The responses of a decode batch while they are corrected.

    Attributes:
        rollouts: What the student wrote before any correction.
        responses: What they have become.
        starts: First position of each response that is not yet read and scored.
        error_positions: Position of each response's first correction.
        num_corrections: Corrections of each response.
    """

    def __init__(self, responses: Sequence[TokenIds]) -> None:
        self.rollouts = self.responses = list(responses)
        self.starts = [0] * len(responses)
        self.error_positions, self.num_corrections = [NO_ERROR] * len(responses), [0] * len(responses)

    @property
    def has_unread(self) -> bool:
        """Whether any response has text that no round has looked at."""
        return any(start < len(response) for start, response in zip(self.starts, self.responses, strict=True))

    def replaced(self, corrections: Sequence[Correction], ends: frozenset[int]) -> list[TokenIds]:
        """The responses with other tokens in these places; a token of ``ends`` is the last of its response."""
        responses = list(self.responses)
        for i, position, token in corrections:
            rest = () if token in ends else responses[i][position + 1 :]
            responses[i] = (*responses[i][:position], token, *rest)
        return responses

    def take(self, corrections: Sequence[Correction], responses: Sequence[TokenIds]) -> None:
        """Continues with what a round has made of the responses."""
        self.responses = list(responses)
        # A response without an error is unchanged, and later rounds no longer look at it (ours).
        self.starts = [len(response) for response in responses]
        for i, position, _ in corrections:
            if self.error_positions[i] == NO_ERROR:
                self.error_positions[i] = position
            self.starts[i], self.num_corrections[i] = position + 1, self.num_corrections[i] + 1


def _sampling(generation: GenerationSection, seed: int) -> Sampling:
    return Sampling(seed, generation.sampling_temperature, SamplingOptions.of(generation))


SOURCE = OnPolicy
