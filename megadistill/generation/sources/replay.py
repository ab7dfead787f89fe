"""Student text of earlier steps, to train on again. Not a mode: ``off_policy`` is made of it."""

from __future__ import annotations

from collections.abc import Sequence

from megadistill.data.sample import Sample
from megadistill.decoding.protocols import TextModel
from megadistill.generation.replay_buffer import ReplayBuffer
from megadistill.generation.sources.base import SourceInputs, TextSource
from megadistill.generation.teacher_states import with_teacher_states
from megadistill.observability.timers import Timers
from megadistill.parallel.rng import Stream


class Replay(TextSource):
    """Draws a batch from ``buffer``; this step's own prompts are not used."""

    kind = "replay"
    student_share = 1.0

    def __init__(self, buffer: ReplayBuffer, teacher: TextModel | None, examples_per_pass: int, seed: int) -> None:
        self.buffer = buffer
        self._teacher, self._examples_per_pass, self._seed = teacher, examples_per_pass, seed

    @classmethod
    def build(cls, inputs: SourceInputs) -> Replay:
        """A source with an empty buffer of ``generation.off_policy.replay_batches`` batches."""
        config, context = inputs.config, inputs.context
        batch_size = config.train.global_batch_size
        buffer = ReplayBuffer(
            config.generation.off_policy.replay_batches * batch_size,
            batch_size,
            dp_rank=context.dp_rank,
            dp_size=context.dp_size,
        )
        return cls(buffer, inputs.teacher, config.train.micro_batch_size, config.run.seed)

    def samples(self, step: int, batch: Sequence[Sample], timers: Timers) -> list[Sample]:
        """A batch from the buffer, read by the teacher."""
        drawn = self.buffer.draw(self._seed, step, stream=Stream.REPLAY)
        with timers("teacher"):
            return with_teacher_states(drawn, self._teacher, self._examples_per_pass)

    def metrics(self) -> dict[str, float]:
        """The buffer's size on all ranks together."""
        return {"replay/rows": float(len(self.buffer))}
