"""Learning rate as a pure function of the step, so that a resume needs no scheduler state."""

from __future__ import annotations

import math

from megadistill.config.optim import OptimSection


def learning_rate(optim: OptimSection, step: int, max_steps: int) -> float:
    """Linear warm-up from lr / warmup, then ``optim.schedule`` down to ``min_lr_ratio * lr`` at the last update.

    Args:
        optim: The settings.
        step: The update, 0-based.
        max_steps: Updates of the run.
    """
    warmup = optim.warmup_steps if optim.warmup_steps is not None else math.ceil(optim.warmup_ratio * max_steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, max_steps - 1 - warmup)
    shape = {
        "cosine": 0.5 * (1 + math.cos(math.pi * min(1.0, progress))),
        "linear": max(0.0, 1 - progress),
        "constant": 1.0,
    }[optim.schedule]
    floor = optim.min_lr_ratio if optim.schedule != "constant" else 1.0
    return optim.lr * (floor + (1 - floor) * shape)
