"""TAID (Shing et al., ICLR 2025, arXiv 2501.16937): how far the way from the student to its teacher is gone.

docs/method.md, "Losses that adapt", has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megadistill.config.adaptive import TaidSection


@dataclass
class Interpolation:
    """The teacher's share t, which rises with the run and faster while the loss falls.

    Everything follows from the loss of the whole step, which all ranks know, so they agree without communication.

    Attributes:
        config: Its start, end and speed.
        max_steps: Steps of the run.
        t: The share of the next step.
        momentum: Moving average of the loss's relative change.
        previous_loss: The token loss of the last step; None before the first.
    """

    config: TaidSection
    max_steps: int
    t: float
    momentum: float = 0.0
    previous_loss: float | None = None

    @classmethod
    def of(cls, config: TaidSection, max_steps: int) -> Interpolation | None:
        """At its start; None where it is off."""
        return cls(config, max_steps, config.start) if config.enabled else None

    def updated(self, done: int, loss: float) -> None:
        """After an update.

        Args:
            done: Updates so far.
            loss: Its token loss over all ranks, in nats.
        """
        config, previous = self.config, self.previous_loss
        self.previous_loss = loss
        gain = 0.0
        if previous is not None:
            change = (previous - loss) / previous if previous > 0 else 0.0
            self.momentum = config.beta * self.momentum + (1 - config.beta) * change
            gain = config.alpha / (1 + math.exp(min(-self.momentum, 700.0))) * (1 - self.t)
        line = config.start + (config.end - config.start) * done / self.max_steps
        self.t = min(config.end, max(line, self.t + gain))

    def metrics(self) -> dict[str, float]:
        """The share that the next step has (asked before ``updated``: this step's), for metrics.jsonl."""
        return {"taid/t": self.t}

    def state_dict(self) -> dict[str, Any]:
        """Entries of a checkpoint's trainer state, the same on every rank and layout."""
        return {"taid": {"t": self.t, "momentum": self.momentum, "previous_loss": self.previous_loss}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a trainer state; from its start where that is of a run without."""
        for name, value in state.get("taid", {}).items():
            setattr(self, name, value)
