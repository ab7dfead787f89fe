"""The events of a run that hooks can act on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from megadistill.training.step import StepResult


@dataclass(frozen=True)
class StepEvent:
    """A step that has ended.

    Attributes:
        step: The step, counted from 1.
        result: Its outcome.
    """

    step: int
    result: StepResult

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the step, to which hooks may add in their order."""
        return self.result.metrics


class Hook:
    """Does nothing.

    Every rank has the same hooks and calls them at the same moments, so a hook may communicate as long as all ranks do.
    """

    def run_started(self, first_step: int) -> None:
        """Before the first step of this process; ``first_step`` updates are done already."""

    def step_started(self, step: int) -> None:
        """Before step ``step`` (counted from 1)."""

    def step_ended(self, event: StepEvent) -> None:
        """After a step and its update."""

    def validated(self, step: int, metrics: Mapping[str, float]) -> None:
        """After a validation."""

    def saved(self, step: int) -> None:
        """After everything was copied for the checkpoint of ``step``; its files may still be being written."""

    def stopped(self, step: int, reason: str) -> None:
        """The run ends after ``step``, before its last one, because of a signal (``reason``)."""

    def finished(self, step: int) -> None:
        """After the last step and its checkpoint."""

    def summary(self) -> dict[str, Any]:
        """Entries of summary.json, after the last step."""
        return {}

    def close(self) -> None:
        """However the run ends, even before ``run_started``."""

    def state_dict(self) -> dict[str, Any]:
        """Entries of a checkpoint's trainer state, the same on every rank."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a trainer state, which may be of a run without this hook."""


class HookList(Hook):
    """Calls hooks in order; as a context, closes them on exit."""

    def __init__(self) -> None:
        self._hooks: list[Hook] = []

    def add(self, *hooks: Hook) -> None:
        """Appends hooks."""
        self._hooks.extend(hooks)

    def _each(self, call: Callable[[Hook], None]) -> None:
        for hook in self._hooks:
            call(hook)

    def run_started(self, first_step: int) -> None:
        """Calls each hook."""
        self._each(lambda hook: hook.run_started(first_step))

    def step_started(self, step: int) -> None:
        """Calls each hook."""
        self._each(lambda hook: hook.step_started(step))

    def step_ended(self, event: StepEvent) -> None:
        """Calls each hook."""
        self._each(lambda hook: hook.step_ended(event))

    def validated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Calls each hook."""
        self._each(lambda hook: hook.validated(step, metrics))

    def saved(self, step: int) -> None:
        """Calls each hook."""
        self._each(lambda hook: hook.saved(step))

    def stopped(self, step: int, reason: str) -> None:
        """Calls each hook."""
        self._each(lambda hook: hook.stopped(step, reason))

    def finished(self, step: int) -> None:
        """Calls each hook."""
        self._each(lambda hook: hook.finished(step))

    def summary(self) -> dict[str, Any]:
        """Entries of all hooks."""
        return {key: value for hook in self._hooks for key, value in hook.summary().items()}

    def close(self) -> None:
        """Closes each hook."""
        self._each(lambda hook: hook.close())

    def state_dict(self) -> dict[str, Any]:
        """Entries of all hooks."""
        return {key: value for hook in self._hooks for key, value in hook.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Shows the state to each hook."""
        self._each(lambda hook: hook.load_state_dict(state))

    def __enter__(self) -> HookList:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()
