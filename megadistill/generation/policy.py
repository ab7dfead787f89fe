"""Whose text a step trains on. One draw per step decides for all ranks: a per-rank draw deadlocks ZeRO-3 and TP."""

from __future__ import annotations

import torch

from megadistill.config.schema import GenerationSection
from megadistill.parallel.rng import uniform

# Streams keep the random numbers of different purposes apart; a round of SCRG adds its index.
STREAM_ROLLOUT = 0
STREAM_TEACHER_TOKEN = 1_000
STREAM_CONTINUATION = 2_000
STREAM_POLICY = 3_000
STREAM_EVALUATION = 4_000


def student_probability(generation: GenerationSection) -> float:
    """Probability that a step trains on the student's own text (reported as ``phi``)."""
    return {"on_policy": 1.0, "mixed": generation.student_ratio, "dataset": 0.0}[generation.mode]


def uses_student_text(generation: GenerationSection, *, seed: int, step: int) -> bool:
    """The step's draw: a function of (seed, step), so every rank, every layout and a resumed run agree."""
    draw = uniform(seed, torch.tensor([step]), torch.tensor([0]), stream=STREAM_POLICY)
    return float(draw) < student_probability(generation)
