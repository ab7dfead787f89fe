"""A run of two ranks that reports to every tracker offline, stopped once and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megadistill.observability.trackers import TRACKERS
from tests.support.runs import run_layout, settings


def test_trackers_hold_what_metrics_hold(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TRACKERS:
        pytest.importorskip(name, reason=f"the extra {name} is not installed")
    from mlflow import MlflowClient

    offline = {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
    }
    for key, value in offline.items():
        monkeypatch.setenv(key, value)
    run_dir, report = tmp_path / "run", f"run.trackers=[{','.join(TRACKERS)}]"
    fixed = settings(assets, "llama", "run.project=distillation", "train.save_every=1", "parallel.tp_size=2")
    run_layout(
        2, [(str(run_dir), [*fixed, f"train.max_steps={steps}", *more]) for steps, more in ((1, ()), (3, (report,)))]
    )
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    ids = json.loads((run_dir / "trackers.json").read_text(encoding="utf-8"))
    assert set(ids) == set(TRACKERS)
    client = MlflowClient()
    assert client.get_run(ids["mlflow"]).info.status == "FINISHED"
    assert client.get_run(ids["mlflow"]).data.params["parallel.tp_size"] == "2"
    losses = {metric.step: metric.value for metric in client.get_metric_history(ids["mlflow"], "loss")}
    assert losses == pytest.approx({line["step"]: line["loss"] for line in lines if line["step"] > 1})
    assert len(list((run_dir / "wandb").glob("offline-run-*"))) == 1  # rank 0 alone
