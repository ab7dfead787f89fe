"""The progress bar of a run."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from megadistill.observability.progress import progress_bar
from megadistill.training.components import Components
from megadistill.training.hooks.base import Hook, StepEvent


class Progress(Hook):
    """A bar on a terminal, plain lines elsewhere, on rank 0; the loss and the speed stand beside it."""

    def __init__(self, components: Components) -> None:
        self._train, self._rank = components.config.train, components.context.rank
        self._held = ExitStack()
        self._bar: Any = None

    def run_started(self, first_step: int) -> None:
        """Shows the bar."""
        bar = progress_bar(
            description="train", total=self._train.max_steps, initial=first_step, unit="step", rank=self._rank
        )
        self._bar = self._held.enter_context(bar)

    def step_ended(self, event: StepEvent) -> None:
        """Advances the bar, with loss and speed every ``train.log_every`` steps."""
        self._bar.update()
        if event.step % self._train.log_every == 0:
            self._bar.set_postfix(
                loss=f"{event.metrics['loss']:.4f}",
                tok_s=f"{event.metrics['throughput/tokens_per_s']:.0f}",
                refresh=False,
            )

    def close(self) -> None:
        """Removes the bar."""
        self._held.close()
