"""Ranks that wait while rank 0 makes the assets: two processes, on machines whose clocks differ."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import psutil
import pytest

from megadistill.cli.preparers import PREPARERS, prepare
from megadistill.config.load import load_config
from megadistill.config.schema import RunSection
from megadistill.demo.recipes import RECIPES
from megadistill.demo.waiting import beat_file

ROOT = Path(__file__).parents[2]
ASSETS = Path("runs/assets/smoke_0")
JOB = {"MASTER_ADDR": "node1", "MASTER_PORT": "12345"}
HOUR_S = 3600.0
# One rank, from the start of the train verb to the point where the assets are there. WORK is what rank 0 does first.
RANK = """
import os, sys, time
from functools import partial
from megadistill.cli.preparers import prepare
from megadistill.config.load import load_config
from megadistill.demo import assets, waiting
from megadistill.errors import DataError, MegadistillError
from megadistill.launch.stopping import stop_requests

waiting.BEAT_S = waiting.POLL_S = assets.POLL_S = 0.05
assets.wait_for_rank0 = partial(assets.wait_for_rank0, patience_s=float(os.environ["PATIENCE_S"]))

def make_assets(name, seed, say, is_stopping, make=assets.make_assets):
    print("working", flush=True)
    exec(os.environ["WORK"])
    make(name, seed, say, is_stopping)

assets.make_assets = make_assets
config = load_config(sys.argv[1])
with stop_requests() as request:
    print("started", flush=True)
    try:
        is_ready = prepare(config, lambda: bool(request.signal))
    except MegadistillError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
sys.exit(0 if is_ready else 85)
"""
USER_ERROR, STOPPED = 2, 85
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    ranks = []

    def start(rank: int, work: str = "", patience_s: float = 60.0, **variables: str) -> subprocess.Popen[str]:
        environment = os.environ | JOB | {"RANK": str(rank), "PYTHONPATH": str(ROOT), "WORK": work}
        environment |= {"PATIENCE_S": str(patience_s), "DS_ACCELERATOR": "cpu"} | variables
        words = [sys.executable, "-u", "-c", RANK, str(ROOT / "configs" / "smoke.yaml")]
        process = subprocess.Popen(words, cwd=tmp_path, env=environment, text=True, stdout=-1, stderr=-1)
        ranks.append(process)
        return process

    yield start
    for process in ranks:
        process.kill()
        process.communicate()


def until(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == word:
            return
    raise AssertionError(f"{word!r} was not printed: {process.communicate()}")


def end(process: subprocess.Popen[str], timeout_s: float = 60.0) -> tuple[int, str]:
    _, errors = process.communicate(timeout=timeout_s)
    return process.returncode, errors


def shift_clock(folder: Path, seconds: float) -> None:
    """Gives the files below ``folder`` the times that a machine with another clock would have given them."""
    for path in [folder, *folder.rglob("*")]:
        now = time.time() + seconds
        try:
            os.utime(path, (now, now))
        except FileNotFoundError:  # a beat was replaced meanwhile
            continue


def leave(tmp_path: Path, outcome: str | None) -> None:
    """What an earlier attempt of the same job left behind."""
    file = beat_file(tmp_path / ASSETS, JOB)
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"attempt": "earlier", "count": 7, "outcome": outcome}), encoding="utf-8")


@pytest.mark.parametrize("skew_s", [-HOUR_S, HOUR_S])
def test_a_rank_waits_until_everything_is_there(start: Start, tmp_path: Path, skew_s: float) -> None:
    leave(tmp_path, "an error of the earlier attempt")
    shift_clock(tmp_path, skew_s)
    other = start(1)
    until(other, "started")
    first = start(0, "time.sleep(1)")
    until(first, "working")
    shift_clock(tmp_path, skew_s)
    assert end(first)[0] == 0
    assert end(other)[0] == 0
    assert (tmp_path / ASSETS / "student").is_dir()
    assert not beat_file(tmp_path / ASSETS, JOB).exists()


@pytest.mark.parametrize("skew_s", [-HOUR_S, HOUR_S])
def test_a_rank_reports_the_failure_of_rank_0(start: Start, tmp_path: Path, skew_s: float) -> None:
    other = start(1)
    until(other, "started")
    first = start(0, "time.sleep(1); raise DataError('disk full at http://me:secret@host')")
    until(first, "working")
    shift_clock(tmp_path, skew_s)
    assert end(first)[0] == USER_ERROR
    code, errors = end(other)
    assert code == USER_ERROR and "disk full at http://***@host" in errors


def test_a_failure_of_another_job_is_not_reported(start: Start, tmp_path: Path) -> None:
    assert end(start(0, "raise DataError('disk full')", MASTER_PORT="999"))[0] == USER_ERROR
    other = start(1)
    until(other, "started")
    assert end(start(0))[0] == 0
    assert end(other)[0] == 0


@pytest.mark.parametrize("leftover", [None, "an error"])
def test_a_rank_gives_up_when_rank_0_stands_still(start: Start, tmp_path: Path, leftover: str | None) -> None:
    """Rank 0 is killed; or it failed before this rank looked."""
    if leftover is not None:
        leave(tmp_path, leftover)
    other = start(1, patience_s=3)
    until(other, "started")
    if leftover is None:
        first = start(0, "time.sleep(100)")
        until(first, "working")
        first.kill()
    code, errors = end(other)
    assert code == USER_ERROR and errors.strip().count("\n") == 0
    assert (leftover or "rank 0 has reported no progress for 3 s") in errors


def test_sigterm_to_rank_0_ends_every_rank_and_what_they_started(start: Start, tmp_path: Path) -> None:
    fine_tuning = tmp_path / "fine_tuning"
    fine_tuning.write_text("#!/bin/sh\necho $$ >pid\nexec sleep 100\n", encoding="utf-8")
    fine_tuning.chmod(0o755)
    other = start(1)
    until(other, "started")
    first = start(0, f"sys.executable = '{fine_tuning}'; assets.run_alone([], is_stopping)")
    until(first, "working")
    while not (tmp_path / "pid").exists():
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    assert end(first)[0] == end(other)[0] == STOPPED
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text(encoding="utf-8")))


def test_sigterm_ends_a_train_verb_that_waits(tmp_path: Path) -> None:
    environment = os.environ | JOB | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "megadistill", "train", "--config", str(ROOT / "configs" / "smoke.yaml")]
    code = "import sys; from megadistill.cli import preparers, main; make = preparers.resolve_name\n"
    code += "preparers.resolve_name = lambda name: print('started', flush=True) or make(name)\n"
    code += "sys.exit(main.main(sys.argv[1:]))"
    words[1:3] = ["-c", code]
    process = subprocess.Popen(words, cwd=tmp_path, env=environment, text=True, stdout=-1, stderr=-1)
    until(process, "started")
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == STOPPED


def test_every_value_of_the_key_has_a_preparer_and_a_recipe() -> None:
    allowed = set(get_args(RunSection.model_fields["prepare"].annotation)) - {"none"}
    assert allowed == set(PREPARERS) == set(RECIPES)


def test_nothing_is_imported_for_a_run_without_built_in_assets(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(ROOT / "configs" / "smoke.yaml", ["run.prepare=none"])
    monkeypatch.setitem(sys.modules, "megadistill.demo.assets", None)
    assert prepare(config, lambda: False)
