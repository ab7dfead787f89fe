"""Experiment trackers that a run reports to beside its own files (``run.trackers``).

To add one: an entry in ``TRACKERS``, its name in ``megadistill.config.schema.TrackerName``, and an extra in setup.py.
Accounts, servers and offline modes are set the way each tracker's own documentation has it (WANDB_MODE,
MLFLOW_TRACKING_URI, ...).
"""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from megadistill.errors import ConfigError, first_line, needs_extra
from megadistill.files import write_json
from megadistill.observability.log import get_logger

_KEY = "run.trackers"
_IDS = "trackers.json"
_LONGEST, _MOST = 500, 100  # characters of a parameter, and parameters of a call, that MLflow takes


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run.

    Attributes:
        folder: ``run.dir``; its last name is the run's.
        project: What the tracker groups runs by.
        settings: The resolved configuration, key by key.
        id: The tracker's own name for the run, where an earlier process began it; None for a new one.
    """

    folder: Path
    project: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    id: str | None = None

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.resolve().name


class Tracker(Protocol):
    """One run in one tracker.

    Attributes:
        id: What ``TrackedRun.id`` must be to go on with it.
    """

    id: str

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Reports numbers of a step; what was reported of a step before stays or is reported again."""

    def close(self, is_done: bool) -> None:
        """Ends the run, as finished or as stopped."""


class _Wandb:
    def __init__(self, run: TrackedRun) -> None:
        with needs_extra("wandb", f"{_KEY}=[wandb]", setting=_KEY):
            import wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", run.project),
            name=run.name,
            id=run.id,
            resume="allow" if run.id else None,
            dir=str(run.folder),
            config=dict(run.settings),
        )
        self.id = str(self._run.id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, is_done: bool) -> None:
        self._run.finish(exit_code=0 if is_done else 1)


class _Trackio:
    def __init__(self, run: TrackedRun) -> None:
        with needs_extra("trackio", f"{_KEY}=[trackio]", setting=_KEY):
            import trackio
        # Runs are known by their names alone, so those of two folders must not be the same.
        self.id = run.id or f"{run.name}-{secrets.token_hex(3)}"
        self._run = trackio.init(
            project=run.project, name=self.id, resume="must" if run.id else "never", config=dict(run.settings)
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, is_done: bool) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, run: TrackedRun) -> None:
        with needs_extra("mlflow", f"{_KEY}=[mlflow]", setting=_KEY):
            from mlflow import MlflowClient
            from mlflow.entities import Param
        self._client = MlflowClient()
        if run.id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", run.project)
            experiment = self._client.get_experiment_by_name(name)
            experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
            self.id = str(self._client.create_run(experiment_id, run_name=run.name).info.run_id)
            parameters = [Param(key, str(value)[:_LONGEST]) for key, value in run.settings.items()]
            for first in range(0, len(parameters), _MOST):
                self._client.log_batch(self.id, params=parameters[first : first + _MOST])
        else:
            self.id = run.id
            self._client.update_run(self.id, status="RUNNING")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, value, int(time.time() * 1000), step) for name, value in values.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def close(self, is_done: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if is_done else "KILLED")


TRACKERS: Mapping[str, Callable[[TrackedRun], Tracker]] = {"wandb": _Wandb, "trackio": _Trackio, "mlflow": _Mlflow}


class Trackers:
    """All trackers of a run, on rank 0 only.

    A tracker that cannot begin ends the run before its first step. One that fails later is left alone after one
    warning: ``metrics.jsonl`` has every number.

    Args:
        names: ``run.trackers``.
        run: What they are told; its ``id`` is not read.
        is_resumed: Whether steps of this folder are gone on with, and so are the trackers' runs (``trackers.json``).

    Raises:
        ConfigError: A tracker's package is missing, or it refuses to begin.
    """

    def __init__(self, names: Sequence[str], run: TrackedRun, *, is_resumed: bool) -> None:
        file = run.folder / _IDS
        known = _read_ids(file) if is_resumed else {}
        self._open: dict[str, Tracker] = {}
        for name in dict.fromkeys(names):
            self._open[name] = _begin(name, replace(run, id=known.get(name)))
        write_json(file, known | {name: tracker.id for name, tracker in self._open.items()})

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Reports the finite numbers among ``values`` under ``step``; None where nothing was measured."""
        measured = {name: float(value) for name, value in values.items() if value is not None}
        numbers = {name: value for name, value in measured.items() if math.isfinite(value)}
        self._each(f"at step {step}", lambda tracker: tracker.log(step, numbers))

    def close(self, is_done: bool) -> None:
        """Ends the runs, as finished or as stopped."""
        self._each("at the end", lambda tracker: tracker.close(is_done))
        self._open = {}

    def _each(self, when: str, do: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                do(tracker)
            except Exception as error:  # of another project's code: whatever it is, training goes on
                get_logger().warning(
                    f"{_KEY}: {name} failed {when} and gets no more: {first_line(error)}; metrics.jsonl has every step"
                )
                del self._open[name]


def _begin(name: str, run: TrackedRun) -> Tracker:
    try:
        return TRACKERS[name](run)
    except ConfigError:
        raise
    except Exception as error:  # of another project's code: no network, no account, no such run
        raise ConfigError(f"{_KEY}: {name} cannot begin: {first_line(error)}", setting=_KEY) from error


def _read_ids(file: Path) -> dict[str, str]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}
