"""Whose text a step trains on. One draw per step decides for all ranks: a per-rank draw deadlocks ZeRO-3 and TP."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from megadistill.config.schema import GenerationSection
from megadistill.generation.off_policy import OffPolicySchedule
from megadistill.generation.replay_buffer import ReplayBuffer
from megadistill.parallel.rng import uniform

# Streams keep the random numbers of different purposes apart; a round of SCRG adds its index.
STREAM_ROLLOUT = 0
STREAM_TEACHER_TOKEN = 1_000
STREAM_CONTINUATION = 2_000
STREAM_POLICY = 3_000
STREAM_REPLAY = 3_001
STREAM_EVALUATION = 4_000
STREAM_TEACHER_TEXT = 5_000

Source = Literal["generate", "replay", "dataset", "teacher"]
SOURCES: tuple[Source, ...] = get_args(Source)


class TextPolicy:
    """Decides where the text of a step comes from; holds what mode ``off_policy`` remembers.

    Everything that decides is the same on every rank: the draw is a function of (seed, step), phi follows the
    validation loss, and the buffer fills alike everywhere.
    """

    def __init__(
        self,
        generation: GenerationSection,
        *,
        seed: int,
        max_steps: int,
        global_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        self._generation, self._seed, self._max_steps = generation, seed, max_steps
        self.schedule: OffPolicySchedule | None = None
        self.buffer: ReplayBuffer | None = None
        if generation.mode == "off_policy":
            settings = generation.off_policy
            self.schedule = OffPolicySchedule(phi=settings.initial_phi, eps=settings.eps)
            capacity = settings.replay_batches * global_batch_size
            self.buffer = ReplayBuffer(capacity, global_batch_size, dp_rank=dp_rank, dp_size=dp_size)

    @property
    def phi(self) -> float:
        """Probability that a step trains on student text, new or replayed."""
        if self.schedule is not None:
            return self.schedule.phi
        return {"on_policy": 1.0, "mixed": self._generation.student_ratio}.get(self._generation.mode, 0.0)

    def source(self, step: int) -> Source:
        """Where the text of ``step`` (0-based) comes from."""
        if self._generation.mode == "teacher":
            return "teacher"
        draw = float(uniform(self._seed, torch.tensor([step]), torch.tensor([0]), stream=STREAM_POLICY))
        if self.schedule is None or self.buffer is None:
            return "generate" if draw < self.phi else "dataset"
        return self.schedule.decide(draw, step, self._max_steps, self.buffer.is_full, self.buffer.is_empty)
