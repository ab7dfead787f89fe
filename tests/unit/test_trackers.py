"""Trackers with the real packages, offline: what they are told is what they hold, also over a resumed run."""

import json
import logging
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from megadistill.config.schema import RunSection
from megadistill.errors import ConfigError
from megadistill.observability import trackers as module
from megadistill.observability.trackers import TRACKERS, TrackedRun, Trackers

ROOT = Path(__file__).resolve().parents[2]


def two_attempts(folder: Path, name: str) -> tuple[str, str]:
    """Reports three steps, then goes on from the second, and returns both ids."""
    ids = []
    for is_resumed, steps in ((False, (1, 2, 3)), (True, (3, 4))):
        run = TrackedRun(folder, "distillation", {"optim.lr": 0.5, "run.trackers": [name], "long": "x" * 2000})
        tracked = Trackers([name], run, is_resumed=is_resumed)
        for step in steps:
            tracked.log(step, {"loss": 10.0 - step, "phi": None, "loss/sft": 1.0, "infinite": float("inf")})
        tracked.close(is_done=is_resumed)
        if name == "wandb":
            time.sleep(1.0)  # the second is in the name of its folder
        ids.append(json.loads((folder / "trackers.json").read_text(encoding="utf-8"))[name])
    return ids[0], ids[1]


def records_of(content: bytes) -> Iterator[bytes]:
    """Records of W&B's offline file: LevelDB's log format (blocks of 32 KiB) with a header of seven bytes."""
    block, header, place, parts = 2**15, 7, 7, b""
    while place + header <= len(content):
        if block - place % block < header:  # too short for another record
            place += block - place % block
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + header])
        parts += content[place + header : place + header + length]
        place += header + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_the_configuration_names_every_tracker() -> None:
    for name in TRACKERS:
        assert RunSection(dir="runs/x", trackers=(name,)).trackers == (name,)  # type: ignore[arg-type]


def test_wandb_holds_every_step_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    from wandb.proto import wandb_internal_pb2

    for key, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(key, value)
    first, second = two_attempts(tmp_path / "myrun", "wandb")
    assert first == second
    losses, configuration = {}, {}
    for file in sorted((tmp_path / "myrun" / "wandb").glob("offline-run-*/*.wandb")):
        for data in records_of(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                assert (record.run.project, record.run.display_name) == ("distillation", "myrun")
                configuration |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.WhichOneof("record_type") == "history":
                row = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                losses[row["_step"]] = row["loss"]
                assert "phi" not in row
    assert losses == {1: 9.0, 2: 8.0, 3: 7.0, 4: 6.0}
    assert configuration["optim.lr"] == 0.5


def test_mlflow_holds_every_step_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    first, second = two_attempts(tmp_path / "myrun", "mlflow")
    assert first == second
    run = MlflowClient().get_run(first)
    assert (run.info.run_name, run.info.status) == ("myrun", "FINISHED")
    assert run.data.params["optim.lr"] == "0.5" and len(run.data.params["long"]) == 500
    losses = {metric.step: metric.value for metric in MlflowClient().get_metric_history(first, "loss")}
    assert losses == {1: 9.0, 2: 8.0, 3: 7.0, 4: 6.0}


def test_trackio_holds_every_step_of_one_run(tmp_path: Path) -> None:
    """In a process of its own: the folder of its database is read when it is imported."""
    pytest.importorskip("trackio", reason="the extra trackio is not installed")
    code = f"""
from pathlib import Path
from tests.unit.test_trackers import two_attempts
from trackio.sqlite_storage import SQLiteStorage
first, second = two_attempts(Path({str(tmp_path)!r}) / "myrun", "trackio")
assert first == second and first.startswith("myrun-"), (first, second)
logs = SQLiteStorage.get_logs("distillation", first)
assert {{row["step"]: row["loss"] for row in logs}} == {{1: 9.0, 2: 8.0, 3: 7.0, 4: 6.0}}, logs
assert two_attempts(Path({str(tmp_path)!r}) / "elsewhere" / "myrun", "trackio")[0] != first
"""
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "store"), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert list((tmp_path / "store").glob("*.db"))


def test_a_stopped_run_is_not_called_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    tracked = Trackers(["mlflow"], TrackedRun(tmp_path / "x", "p"), is_resumed=False)
    tracked.close(is_done=False)
    (id,) = json.loads((tmp_path / "x" / "trackers.json").read_text(encoding="utf-8")).values()
    assert MlflowClient().get_run(id).info.status == "KILLED"


@pytest.mark.parametrize("name", list(TRACKERS))
def test_a_package_that_is_missing_ends_the_run_with_its_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"run.trackers=\[{name}\].*pip install 'megadistill\[{name}\]'"):
        Trackers([name], TrackedRun(tmp_path, "p"), is_resumed=False)


class Faulty:
    """A tracker whose server goes away at the second step."""

    id = "1"

    def __init__(self, run: TrackedRun) -> None:
        self.steps: list[int] = []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Fails at the second step."""
        if step == 2:
            raise OSError("the server is gone\nand more")
        self.steps.append(step)

    def close(self, is_done: bool) -> None:
        """Is not reached."""
        raise AssertionError("closed")


def test_a_tracker_that_fails_is_left_alone_after_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[Faulty] = []
    monkeypatch.setattr(module, "TRACKERS", {"faulty": lambda run: made.append(Faulty(run)) or made[-1]})
    logger: Any = module.get_logger()
    with caplog.at_level(logging.WARNING, logger=logger.name):
        logger.addHandler(caplog.handler)
        tracked = Trackers(["faulty"], TrackedRun(tmp_path, "p"), is_resumed=False)
        for step in (1, 2, 3):
            tracked.log(step, {"loss": 1.0})
        tracked.close(is_done=True)
        logger.removeHandler(caplog.handler)
    assert made[0].steps == [1]
    (message,) = {record.getMessage() for record in caplog.records}
    assert message == (
        "run.trackers: faulty failed at step 2 and gets no more: the server is gone; metrics.jsonl has every step"
    )


def test_a_tracker_that_cannot_begin_ends_the_run_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(run: TrackedRun) -> Any:
        raise RuntimeError("no account\nTraceback follows")

    monkeypatch.setattr(module, "TRACKERS", {"faulty": refuse})
    with pytest.raises(ConfigError, match="^run.trackers: faulty cannot begin: no account$"):
        Trackers(["faulty"], TrackedRun(tmp_path, "p"), is_resumed=False)
