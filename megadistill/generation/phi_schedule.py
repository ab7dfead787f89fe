"""When a step writes new text and when it trains on earlier text: DistiLLM's adaptive off-policy scheduler.

Defined by docs/method.md as in DistiLLM's code (J. Ko, S. Kim, T. Chen, S.-Y. Yun, "DistiLLM: Towards Streamlined
Distillation for Large Language Models", ICML 2024). Student text starts rare and becomes more frequent whenever the
student's validation loss rises, a sign that it meets too little of its own text; in the course of training,
more of that text comes from the replay buffer, which costs no generation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from megadistill.errors import DivergenceError

Choice = Literal["generate", "replay", "dataset"]


@dataclass
class OffPolicySchedule:
    """DistiLLM's schedule. It changes only with what all ranks know, so they agree without communication.

    Attributes:
        phi: Probability that a step trains on student text, new or replayed.
        previous_loss: The mark: validation loss (nats) at the last rise of phi, or the first one; None before any.
        eps: Phi rises where the loss has risen by this much (nats).
        step_size: What phi rises by.
        max_phi: Where it ends.
    """

    phi: float = 0.0
    previous_loss: float | None = None
    eps: float = 0.1
    step_size: float = 0.1
    max_phi: float = 1.0

    def observe(self, validation_loss: float) -> None:
        """Raises phi by ``step_size``, up to ``max_phi``, where the loss is at least the previous one plus ``eps``.

        Then it remembers the loss; any other loss is forgotten, as in DistiLLM's code: while the loss falls, the mark
        stays where it was. The first observation only sets the mark; DistiLLM validates once before training for that,
        so a caller that wants its schedule does too.

        Args:
            validation_loss: In nats.

        Raises:
            DivergenceError: The loss is not finite: no loss would ever exceed such a mark.
        """
        if not math.isfinite(validation_loss):
            raise DivergenceError(f"the validation loss is {validation_loss}; the off-policy schedule cannot continue")
        if self.previous_loss is None:
            self.previous_loss = validation_loss
        elif validation_loss >= self.previous_loss + self.eps:
            # Rounded, because ten times 0.1 stops short of 1.
            self.phi = min(round(self.phi + self.step_size, 12), self.max_phi)
            self.previous_loss = validation_loss

    def decide(
        self, draw: float, step: int, max_steps: int, buffer_is_full: bool, buffer_is_empty: bool = False
    ) -> Choice:
        """What a step trains on.

        New text with probability phi * (1 - step / max_steps), and in all of phi until the buffer is full; replayed
        text in the rest of phi; references otherwise. An empty buffer is never replayed, even if it is called full.

        Args:
            draw: A number in (0, 1), the same on every rank.
            step: The step, 0-based.
            max_steps: Steps of the run.
            buffer_is_full: Whether the replay buffer is full.
            buffer_is_empty: Whether it is empty.
        """
        if draw < self.phi * (1 - step / max_steps):
            return "generate"
        if draw < self.phi:
            return "replay" if buffer_is_full and not buffer_is_empty else "generate"
        return "dataset"

    def state_dict(self) -> dict[str, Any]:
        """What has been learned from validations; the other fields are the configuration's."""
        return {"phi": self.phi, "previous_loss": self.previous_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved ``state_dict``."""
        self.phi, self.previous_loss = state["phi"], state["previous_loss"]
