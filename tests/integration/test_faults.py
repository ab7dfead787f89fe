"""The fault matrix: which process dies, when; how the job ends, that none is left, and that it resumes undisturbed.

docs/reliability.md has the table that `FAULT_TABLE=FILE pytest tests/integration/test_faults.py` measures.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from megadistill.errors import ExitCode
from tests.support.launched import alive, launch
from tests.support.runs import ROOT, losses, run_layout, samples, settings

LOST, STOPPED = ExitCode.LOST_RANKS, ExitCode.STOPPED
STEPS = 6
LIMIT_S = 300  # generous: what must never be is a job that hangs


def _settings(assets: Path, *more: str) -> list[str]:
    fixed = ("parallel.tp_size=2", f"train.max_steps={STEPS}", "train.save_every=2", "parallel.timeout_s=20")
    return settings(assets, "llama", *fixed, "train.stop_grace_s=10", *more)


@pytest.fixture(scope="module")
def undisturbed(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run_layout(2, [(str(out), _settings(assets))])
    return out


@dataclass
class Ended:
    """What became of a job."""

    code: int
    seconds: float  # from the fault to the last process
    survivors: list[int]
    text: str


@dataclass
class Job:
    """Two ranks of the real launcher, one of which has a fault in it."""

    assets: Path
    folder: Path
    fault: str
    more: tuple[str, ...] = ()
    processes: dict[str, int] = field(default_factory=dict)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def run(self, then: Callable[[Job], None] | None = None) -> Ended:
        """Starts it, waits for the fault, does ``then``, and waits for the end of every process."""
        log, script = (self.folder / "log").open("w", encoding="utf-8"), ROOT / "tests" / "support" / "faulty_rank.py"
        fault = {"FAULT": self.fault, "FAULT_DIR": str(self.folder)}
        runner = launch(script, self.run_dir, _settings(self.assets, *self.more), log, **fault)
        deadline, everyone = time.monotonic() + LIMIT_S, {runner.pid: psutil.Process(runner.pid)}
        hit: float | None = None
        while time.monotonic() < deadline:
            if runner.poll() is None:
                below = psutil.Process(runner.pid).children(recursive=True)
                everyone |= {process.pid: process for process in below}
            if hit is None and (self.folder / "hit").exists():
                hit = time.monotonic()
                if then is not None:
                    then(self)
            if runner.poll() is not None and not alive(everyone.values()):
                break
            time.sleep(0.1)
        survivors = [process.pid for process in alive(everyone.values())]
        ended = time.monotonic()
        assert hit is not None, (self.folder / "log").read_text(encoding="utf-8")
        for process in alive(everyone.values()):
            process.kill()
        code = runner.wait(10)
        log.close()
        return Ended(code, ended - hit, survivors, (self.folder / "log").read_text(encoding="utf-8"))

    def rank(self, number: int) -> int:
        return int((self.folder / f"rank_{number}").read_text(encoding="utf-8"))


def _can_mount() -> bool:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
        if done.returncode == 0:
            subprocess.run(["umount", folder], check=True)
        return done.returncode == 0


def note(what: str, ended: Ended) -> None:
    """One line of the table of docs/reliability.md, where it is asked for."""
    if "FAULT_TABLE" in os.environ:
        with Path(os.environ["FAULT_TABLE"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"fault": what, "seconds": round(ended.seconds, 1), "code": ended.code}) + "\n")


def goes_on(assets: Path, undisturbed: Path, run_dir: Path, *more: str) -> None:
    """The same command again ends with the numbers and the text of an undisturbed run."""
    latest = run_dir / "checkpoints" / "latest"
    if latest.exists():
        assert (run_dir / "checkpoints" / latest.read_text(encoding="utf-8").strip() / "manifest.json").is_file()
    run_layout(2, [(str(run_dir), _settings(assets, *more))])
    assert losses(run_dir) == losses(undisturbed)
    assert losses(run_dir, "grad_norm") == losses(undisturbed, "grad_norm")
    assert samples(run_dir) == samples(undisturbed)


# Every place, and every victim; where the table is measured, all pairs.
KILLS = [("start:1", "launcher"), ("rollout:4", "rank 0"), ("backward:6", "rank 1"), ("save:2", "launcher")]
if "FAULT_TABLE" in os.environ:
    KILLS = list(itertools.product(("start:1", "rollout:4", "backward:6", "save:2"), ("rank 0", "rank 1", "launcher")))


@pytest.mark.parametrize(("place", "victim"), [*KILLS, ("hf:2", "rank 0")])  # rank 0 writes all of so small a model
def test_a_killed_process_ends_the_job(
    assets: Path, undisturbed: Path, tmp_path: Path, place: str, victim: str
) -> None:
    action = "0:kill_launcher" if victim == "launcher" else f"{victim[-1]}:kill"
    job = Job(assets, tmp_path, f"{place}:{action}")
    ended = job.run()
    note(f"kill -9 of {victim} in {place.partition(':')[0]}", ended)
    assert ended.survivors == [], ended.text
    # DeepSpeed's runner returns 0 when its per-node launcher was killed.
    assert ended.code in ({0, STOPPED, LOST} if victim == "launcher" else {LOST, 247}), ended.text
    if victim != "launcher" and place != "start:1":
        assert "rank 0, where the ranks meet" in ended.text or f"rank {victim[-1]} on" in ended.text, ended.text
    goes_on(assets, undisturbed, job.run_dir)


def test_a_frozen_rank_ends_the_job_after_its_timeout(assets: Path, undisturbed: Path, tmp_path: Path) -> None:
    job = Job(assets, tmp_path, "rollout:4:1:freeze", ("parallel.timeout_s=8",))
    ended = job.run()
    note("rank 1 stopped forever (SIGSTOP), parallel.timeout_s=8", ended)
    assert ended.survivors == [], ended.text
    assert ended.code == LOST, ended.text
    assert "rank 1 on" in ended.text and "no heartbeat" in ended.text, ended.text
    goes_on(assets, undisturbed, job.run_dir)


def test_a_slowed_rank_is_waited_for(assets: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Less than the timeout: nothing happens but time (FAULT_SLOW_S seconds, where the table is measured: minutes)."""
    slow_s = int(os.environ.get("FAULT_SLOW_S", "12"))

    def go_on(job: Job) -> None:
        time.sleep(slow_s)
        os.kill(job.rank(1), signal.SIGCONT)

    job = Job(assets, tmp_path, "backward:5:1:freeze", (f"parallel.timeout_s={slow_s + 8}",))
    ended = job.run(go_on)
    note(f"rank 1 stopped for {slow_s} s, parallel.timeout_s={slow_s + 8}, then let go", ended)
    assert (ended.survivors, ended.code) == ([], 0), ended.text
    assert losses(job.run_dir) == losses(undisturbed)


def test_a_storm_of_signals_is_one_request(assets: Path, undisturbed: Path, tmp_path: Path) -> None:
    def storm(job: Job) -> None:
        for _ in range(100):
            for rank in (0, 1):
                os.kill(job.rank(rank), signal.SIGTERM)
            time.sleep(0.01)

    job = Job(assets, tmp_path, "rollout:3:0:sleep=0.5")
    ended = job.run(storm)
    note("200 SIGTERM within a second", ended)
    assert (ended.survivors, ended.code) == ([], STOPPED), ended.text
    goes_on(assets, undisturbed, job.run_dir)


@pytest.mark.parametrize(("place", "rank"), [("save:2", 1), ("hf:2", 0), ("commit:2", 0)])
def test_a_full_disk_costs_the_steps_since_the_last_checkpoint(
    assets: Path, undisturbed: Path, tmp_path: Path, place: str, rank: int
) -> None:
    job = Job(assets, tmp_path, f"{place}:{rank}:full_disk")
    ended = job.run()
    note(f"no space left for rank {rank} ({place.partition(':')[0]})", ended)
    assert (ended.survivors, ended.code) == ([], 2), ended.text
    assert f"step 4 could not be written: rank {rank}: No space left on device" in ended.text
    assert (job.run_dir / "checkpoints" / "latest").read_text(encoding="utf-8") == "step_2\n"
    assert not list((job.run_dir / "checkpoints").glob("*.partial"))
    goes_on(assets, undisturbed, job.run_dir)


def test_a_crash_of_one_rank_ends_all(assets: Path, undisturbed: Path, tmp_path: Path) -> None:
    job = Job(assets, tmp_path, "rollout:4:1:crash")
    ended = job.run()
    note("an exception in rank 1", ended)
    assert ended.survivors == [] and ended.code != 0, ended.text
    assert "a bug of ours" in ended.text
    goes_on(assets, undisturbed, job.run_dir)


def test_a_data_file_that_disappears_costs_nothing_until_the_next_start(
    assets: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Rows are read once, at the start: the run continues; to resume it the file is needed, and an error names it."""
    rows = tmp_path / "rows.jsonl"
    shutil.copy(assets / "data" / "train.jsonl", rows)
    job = Job(assets, tmp_path, "rollout:2:0:sleep=0.1", (f"data.train_path={rows}",))
    ended = job.run(lambda _: rows.unlink())
    note("data.train_path is deleted in a run", ended)
    assert (ended.survivors, ended.code) == ([], 0), ended.text
    assert losses(job.run_dir) == losses(undisturbed)
    again = Job(assets, tmp_path, "rollout:99:0:sleep=0", (f"data.train_path={rows}", "train.max_steps=8"))
    (tmp_path / "hit").write_text("", encoding="utf-8")
    ended = again.run()
    note("the same, at the next start", ended)
    assert (ended.survivors, ended.code) == ([], 2), ended.text
    assert f"{rows}" in ended.text


@pytest.mark.skipif(not _can_mount(), reason="a separate file system needs root and mount")
def test_a_disk_that_is_really_full(assets: Path, undisturbed: Path, tmp_path: Path) -> None:
    """run.dir on a file system that holds two checkpoints; on a larger one the run resumes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1400k", "tmpfs", str(disk)], check=True)
    try:
        (tmp_path / "run").symlink_to(disk)
        job = Job(assets, tmp_path, "save:2:0:sleep=0")
        ended = job.run()
        note("the file system of run.dir is full", ended)
        assert (ended.survivors, ended.code) == ([], 2), ended.text
        assert "No space left on device" in ended.text
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        goes_on(assets, undisturbed, job.run_dir)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
