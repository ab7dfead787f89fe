"""Handling of steps with NaN or infinite numbers: the batch is kept in a file, and the run stops or skips the step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megadistill.data.sample import TokenIds
from megadistill.errors import DivergenceError
from megadistill.observability.log import get_logger
from megadistill.observability.metrics import JsonLines
from megadistill.training.components import Components
from megadistill.training.hooks.base import Hook, StepEvent

FOLDER = "nonfinite"
_STATE = "num_nonfinite"
_TERMS = ("loss", "loss/sft", "loss/dac_kl", "loss/span", "grad_norm")


class NonFinite(Hook):
    """Counts consecutive steps without an update.

    Collective over the world after such a step; raises on every rank or on none.

    Args:
        run_dir: The folder of the run.
        components: What the run is made of.
    """

    def __init__(self, run_dir: Path, components: Components) -> None:
        self._run_dir, self._components, self._consecutive = run_dir, components, 0

    def step_ended(self, event: StepEvent) -> None:
        """Writes the batch of a step without an update to a file.

        Raises:
            DivergenceError: The run is to stop.
        """
        train, context = self._components.config.train, self._components.context
        if event.result.is_updated:
            self._consecutive = 0
            return
        self._consecutive += 1
        file = self._run_dir / FOLDER / f"step_{event.step}.jsonl"
        samples = [sample for part in context.gather_objects_over_dp(self._describe(event)) for sample in part]
        context.run_on_rank0(lambda: self._dump(file, event, samples), file)
        terms = ", ".join(f"{name} {event.metrics[name]}" for name in _TERMS)
        num_bad = sum(not sample["is_finite"] for sample in samples)
        what = (
            f"step {event.step} is not finite ({terms}; {num_bad} of {len(samples)} rows are not); nothing was "
            f"updated, its batch is in {file}"
        )
        if train.on_nonfinite == "stop":
            raise DivergenceError(f"{what}; look at its examples, lower optim.lr, or set train.on_nonfinite=skip")
        if self._consecutive >= train.max_nonfinite:
            raise DivergenceError(
                f"{what}; so were the {self._consecutive - 1} before it (train.max_nonfinite={train.max_nonfinite})"
            )
        get_logger(context.rank, "train").warning(f"{what}; skipped")

    def state_dict(self) -> dict[str, Any]:
        """The count, where it is not 0."""
        return {_STATE: self._consecutive} if self._consecutive else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the count."""
        self._consecutive = int(state.get(_STATE, 0))

    def _dump(self, file: Path, event: StepEvent, samples: list[dict[str, Any]]) -> None:
        dump = JsonLines(file)
        dump.append({"step": event.step, **{name: str(event.metrics[name]) for name in _TERMS}})
        for sample in samples:
            dump.append({"step": event.step, **sample})
        dump.close()

    def _describe(self, event: StepEvent) -> list[dict[str, Any]]:
        def text(token_ids: TokenIds | None) -> str | None:
            return None if token_ids is None else str(self._components.tokenizer.decode(list(token_ids)))

        def ids(token_ids: TokenIds | None) -> list[int] | None:
            return None if token_ids is None else list(token_ids)

        return [
            {
                "is_finite": is_finite,
                "prompt": text(sample.prompt_ids),
                "reference": text(sample.reference_ids),
                "text": text(sample.response_ids),
                "prompt_ids": ids(sample.prompt_ids),
                "reference_ids": ids(sample.reference_ids),
                "text_ids": ids(sample.response_ids),
            }
            for sample, is_finite in zip(event.result.samples, event.result.finite, strict=True)
        ]
