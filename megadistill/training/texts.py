"""Where the text of a step comes from: written and corrected now, replayed, the teacher's own, or the references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megadistill.data.tokenize import TokenizedExample
from megadistill.decoding.protocols import Correction, Decoder, Rows, Sampling, TeacherScores
from megadistill.decoding.rollout import RolloutState
from megadistill.generation.policy import STREAM_CONTINUATION, STREAM_REPLAY, STREAM_ROLLOUT
from megadistill.generation.replay_buffer import ReplayEntry
from megadistill.generation.scoring import TeacherStates, score_rows
from megadistill.generation.scrg import NO_ERROR, Revision, revise
from megadistill.observability.timers import Timers
from megadistill.training.components import Components
from megadistill.training.micro_batch import TrainingRow


@dataclass(frozen=True)
class BatchRow:
    """A prompt of the step: its global sequence id, its tokens, and whether its reference may be used."""

    sequence_id: int
    example: TokenizedExample
    reference: tuple[int, ...] | None


@dataclass(frozen=True)
class Writing:
    """What the student wrote, and what became of it."""

    written: Rows
    revision: Revision


def write_and_revise(
    rows: Sequence[BatchRow], components: Components, timers: Timers
) -> tuple[list[TrainingRow], Writing]:
    """SCRG (paper, Eq. 3-4) on all rows of the step, as many at a time as the cache may hold.

    Student parameters are gathered once for writing, scoring and re-generation. Rows per rank and waves are equal in
    number on every rank, and so are the teacher's readings.
    """
    waves: list[tuple[list[TrainingRow], Writing]] = []
    with components.student.decoder() as writer:
        for start in range(0, len(rows), components.decode_plan.num_rows):
            waves.append(_write_wave(rows[start : start + components.decode_plan.num_rows], writer, components, timers))
    written = [writing.written for _, writing in waves]
    revisions = [writing.revision for _, writing in waves]
    everything = Writing(
        _all_rows(written),
        Revision(
            _all_rows([revision.rows for revision in revisions]),
            tuple(position for revision in revisions for position in revision.error_positions),
            tuple(count for revision in revisions for count in revision.num_corrections),
            tuple(start for revision in revisions for start in revision.unread_from),
        ),
    )
    return [row for wave, _ in waves for row in wave], everything


def _write_wave(
    rows: Sequence[BatchRow], writer: Decoder, components: Components, timers: Timers
) -> tuple[list[TrainingRow], Writing]:
    generation, teacher = components.config.generation, components.teacher
    assert teacher is not None
    prompts = Rows(tuple(r.sequence_id for r in rows), tuple(r.example.prompt_ids for r in rows), ((),) * len(rows))
    limits = [components.response_limit(len(prompt)) for prompt in prompts.prompts]
    sampling = Sampling(
        components.config.run.seed, generation.sampling_temperature, top_k=generation.top_k, top_p=generation.top_p
    )
    with timers("rollout"):
        rollout_state = RolloutState(
            writer, prompts, limits=limits, eos_ids=components.eos_ids, sampling=sampling,
            keep_hidden=generation.scrg.enabled,
        )  # fmt: skip
        rollout_state.write(STREAM_ROLLOUT)
    written = rollout_state.rows
    columns = max(len(prompt) + limit for prompt, limit in zip(prompts.prompts, limits, strict=True))
    keeps = generation.scrg.enabled and components.decode_plan.keeps_teacher
    read = TeacherStates(components.prefiller(), prompts.prompts, columns, keep=keeps)

    def score(text: Rows, starts: Sequence[int], round_index: int) -> TeacherScores:
        with timers("teacher"):
            read.update(text.responses, starts)
        with timers("score"):
            return score_rows(
                text,
                starts,
                student_hidden=[rollout_state.hidden(row, start) for row, start in enumerate(starts)],
                student_head=writer.head,
                teacher_hidden=[read.hidden[row][start:] for row, start in enumerate(starts)],
                teacher_head=teacher.head,
                shard=components.student.shard,
                seed=components.config.run.seed,
                round_index=round_index,
                sample_teacher=generation.scrg.teacher_token == "sample",
                backend=components.loss.backend,
            )

    def rewrite(corrections: Sequence[Correction], round_index: int) -> Rows:
        with timers("regenerate"):
            rollout_state.rewrite(corrections, STREAM_CONTINUATION + round_index)
            return rollout_state.rows

    revision = Revision(written, (NO_ERROR,) * len(rows), (0,) * len(rows), (0,) * len(rows))
    if generation.scrg.enabled:
        revision = revise(written, score=score, rewrite=rewrite, rounds=generation.scrg.rounds)
    with timers("teacher"):
        read.update(revision.rows.responses, revision.unread_from)
    training = [
        TrainingRow(row.example.prompt_ids, row.reference, text, teacher_hidden=hidden)
        for row, text, hidden in zip(rows, revision.rows.responses, read.hidden, strict=True)
    ]
    return training, Writing(written, revision)


def remember(step: int, rows: Sequence[BatchRow], writing: Writing, components: Components) -> None:
    """Puts a step's corrected text into the replay buffer, where there is one."""
    if components.policy.buffer is None:
        return
    revision = writing.revision
    components.policy.buffer.append(
        [
            ReplayEntry(
                sequence_id=row.sequence_id,
                step=step,
                prompt=row.example.prompt_ids,
                reference=row.reference,
                text=revision.rows.responses[i],
                error_position=revision.error_positions[i],
                num_corrections=revision.num_corrections[i],
            )
            for i, row in enumerate(rows)
        ]
    )


def replayed(step: int, components: Components) -> list[TrainingRow]:
    """Rows of earlier steps, with the text that the student wrote then."""
    assert components.policy.buffer is not None
    entries = components.policy.buffer.draw(components.config.run.seed, step, stream=STREAM_REPLAY)
    return [TrainingRow(entry.prompt, entry.reference, entry.text) for entry in entries]


def _all_rows(waves: Sequence[Rows]) -> Rows:
    return Rows(
        tuple(i for wave in waves for i in wave.sequence_ids),
        tuple(prompt for wave in waves for prompt in wave.prompts),
        tuple(response for wave in waves for response in wave.responses),
    )
