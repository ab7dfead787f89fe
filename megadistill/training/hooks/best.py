"""The best validation of a run: its checkpoint is kept, and a run may end when no other has been better for long."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megadistill.config.schema import RunConfig
from megadistill.data.encode import TokenizedExample
from megadistill.data.fingerprint import is_fingerprint_of, rows_fingerprint
from megadistill.errors import DataError
from megadistill.observability.log import get_logger
from megadistill.training.hooks.base import Hook

_STATE = "best_validation"
_DEFAULT_METRIC = "eval/nll"
_LOWER_IS_BETTER = frozenset({"eval/nll"})


@dataclass(frozen=True)
class BestValidation:
    """The best validation so far.

    Attributes:
        metric: What it is the best by.
        value: Its value; NaN where no validation has had a finite one.
        step: Its step; 0 before the first validation.
        num_since: Validations since then.
        rows: Stands for the rows that are validated on.
    """

    metric: str
    value: float = math.nan
    step: int = 0
    num_since: int = 0
    rows: str = ""

    def then(self, step: int, value: float) -> BestValidation:
        """The best one after another validation."""
        is_first = math.isnan(self.value) and math.isfinite(value)
        gain = self.value - value if self.metric in _LOWER_IS_BETTER else value - self.value
        if is_first or gain > 0:
            return replace(self, value=value, step=step, num_since=0)
        return replace(self, num_since=self.num_since + 1)

    def ends(self, config: RunConfig) -> bool:
        """Whether ``train.early_stopping`` ends the run here."""
        patience = config.train.early_stopping
        return 0 < patience <= self.num_since


class Best(Hook):
    """Remembers the best validation, across resumes too.

    Every rank sees the same validations and decides alike. Without ``checkpoint.keep_best`` it only remembers, by the
    likelihood.

    Args:
        config: The configuration of the run.
        examples: Examples to validate on; the first ``train.eval_rows`` are used.
        rank: Rank 0 logs that an earlier best one does not count.

    Attributes:
        found: The best validation so far.
    """

    def __init__(self, config: RunConfig, examples: Sequence[TokenizedExample], rank: int = 0) -> None:
        self._config, self._rank, self._examples = config, rank, examples[: config.train.eval_rows]
        rows = rows_fingerprint(self._examples)
        self.found = BestValidation(config.checkpoint.keep_best or _DEFAULT_METRIC, rows=rows)

    @property
    def kept_step(self) -> int | None:
        """The step whose checkpoint is to be kept; None where there is none yet, or none is wanted."""
        return self.found.step or None if self._config.checkpoint.keep_best else None

    @property
    def is_over(self) -> bool:
        """Whether ``train.early_stopping`` ends the run."""
        return self.found.ends(self._config)

    def validated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Compares a validation with the best one; the one before the first step has no checkpoint and is left out."""
        if step and self.found.metric in metrics:
            self.found = self.found.then(step, metrics[self.found.metric])

    def forget(self) -> None:
        """Makes the next validation the best one."""
        self.found = BestValidation(self.found.metric, rows=self.found.rows)

    def summary(self) -> dict[str, Any]:
        """The best validation, the checkpoint that is kept of it, and whether the run ended because of it."""
        found = self.found
        best = {"metric": found.metric, "value": found.value, "step": found.step, "checkpoint": None}
        if self.kept_step is not None:
            best["checkpoint"] = f"step_{self.kept_step}"
        return {"best_validation": best if found.step else None, "stopped_early": self.is_over}

    def state_dict(self) -> dict[str, Any]:
        """The best validation, where there was any."""
        return {_STATE: asdict(self.found)} if self.found.step or self.found.num_since else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues with the saved one, where it is by the same metric and of the same rows."""
        found = best_of(state)
        if found is None:
            return
        if self.continues(found):
            self.found = replace(found, rows=self.found.rows)
        elif self._config.checkpoint.keep_best and found.step:
            get_logger(self._rank, "train").warning(
                f"the best validation so far, of step {found.step}, was by {found.metric} on "
                f"{'the same' if found.rows == self.found.rows else 'other'} rows; it does not count any more"
            )

    def continues(self, found: BestValidation) -> bool:
        """Whether the validations of this run can be compared with a saved one."""
        return found.metric == self.found.metric and is_fingerprint_of(found.rows, self._examples)


def best_of(state: Mapping[str, Any]) -> BestValidation | None:
    """The best validation in a checkpoint's trainer state; None where there is none."""
    return BestValidation(**state[_STATE]) if _STATE in state else None


def check_best(config: RunConfig, examples: Sequence[TokenizedExample]) -> None:
    """Checks that the validations will have the metric of ``checkpoint.keep_best``.

    Args:
        config: The configuration of the run.
        examples: Examples to validate on.

    Raises:
        DataError: They will not.
    """
    metric, rows = config.checkpoint.keep_best, config.train.eval_rows
    if metric is not None and not any(example.references for example in examples[:rows]):
        raise DataError(
            f"{config.data.valid_path}: none of the first train.eval_rows={rows} rows has a reference, and "
            f"checkpoint.keep_best={metric} compares with references",
            setting="checkpoint.keep_best, data.valid_path",
        )
