"""The progress bar of a run."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from megadistill.observability.progress import progress_bar
from megadistill.training.components import Components
from megadistill.training.hooks.base import Hook, StepEvent


class Progress(Hook):
    """A bar on a terminal, plain lines elsewhere, on rank 0; loss, learning rate, speed and epoch stand beside it."""

    def __init__(self, components: Components) -> None:
        self._every, self._total = components.config.train.log_every, components.length.max_steps
        self._rank = components.context.rank
        self._held = ExitStack()
        self._bar: Any = None
        self._since: list[dict[str, float]] = []

    def run_started(self, first_step: int) -> None:
        """Shows the bar."""
        bar = progress_bar(description="train", total=self._total, initial=first_step, unit="step", rank=self._rank)
        self._bar = self._held.enter_context(bar)

    def step_ended(self, event: StepEvent) -> None:
        """Advances the bar. Every ``train.log_every`` steps, and at the last one, the numbers beside it are new.

        They are means over the steps since the last time, and say which steps these are where there are several.
        """
        self._since.append(event.metrics)
        if event.step % self._every == 0 or event.step == self._total:
            self._bar.set_postfix_str(progress_words(event.step, self._since), refresh=False)
            self._since = []
        self._bar.update()

    def close(self) -> None:
        """Removes the bar."""
        self._held.close()


def progress_words(step: int, metrics: list[dict[str, float]]) -> str:
    """The numbers beside the bar.

    Args:
        step: The last of the steps that they are of.
        metrics: The metrics of each.
    """

    def mean(name: str) -> float:
        return sum(entry[name] for entry in metrics) / len(metrics)

    first = step - len(metrics) + 1
    of = f" (mean of steps {first} to {step})" if first < step else ""
    return (
        f"loss {mean('loss'):.4f}{of}, lr {metrics[-1]['lr']:.2e}, "
        f"{mean('throughput/tokens_per_s'):.0f} tokens/s, epoch {metrics[-1]['epoch']:.2f}"
    )
