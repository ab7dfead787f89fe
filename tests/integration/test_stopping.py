"""Ways to end a run from outside, on the real launcher: which processes are asked, what is saved, that none is left."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megadistill.checkpoint.hf_export import check_export
from megadistill.errors import ExitCode
from tests.support.launched import alive, launch
from tests.support.runs import ROOT, run_layout, samples, settings

STOPPED = ExitCode.STOPPED


class Run:
    """A launched run of two ranks that would take forever, and all its processes."""

    def __init__(self, assets: Path, run_dir: Path, *more: str) -> None:
        self.run_dir = run_dir
        words = settings(
            assets, "llama", "train.max_steps=100000", "parallel.tp_size=2", "train.stop_grace_s=20", *more
        )
        self.log = run_dir.with_suffix(".log").open("w", encoding="utf-8")
        self.runner = launch(ROOT / "launchers" / "run.sh", run_dir, words, self.log)
        self.wait_for_step(2)
        below = psutil.Process(self.runner.pid).children(recursive=True)
        self.ranks = {int(p.environ()["RANK"]): p for p in below if "RANK" in p.environ() and "train" not in p.name()}
        self.launcher = next(p for p in below if "deepspeed.launcher.launch" in p.cmdline())
        self.everyone = [psutil.Process(self.runner.pid), *below]

    def wait_for_step(self, step: int, seconds: float = 120) -> None:
        metrics, deadline = self.run_dir / "metrics.jsonl", time.monotonic() + seconds
        while not metrics.exists() or len(metrics.read_text(encoding="utf-8").splitlines()) < step:
            assert time.monotonic() < deadline and self.runner.poll() is None, self.text()
            time.sleep(0.1)

    def text(self) -> str:
        return Path(self.log.name).read_text(encoding="utf-8")

    def survivors(self, seconds: float = 60) -> list[psutil.Process]:
        """Processes that are there after some time; they are ended."""
        deadline = time.monotonic() + seconds
        while (alive := self._alive()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in alive:
            process.kill()
        return alive

    def _alive(self) -> list[psutil.Process]:
        self.runner.poll()  # ours to reap; psutil would take its exit code away
        return alive(self.everyone)

    def close(self) -> None:
        self.survivors(0)
        self.runner.wait(30)
        self.log.close()


@pytest.fixture
def run(assets: Path, tmp_path: Path) -> Iterator[Run]:
    started = Run(assets, tmp_path / "run")
    yield started
    started.close()


def steps(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def last_saved(run_dir: Path) -> int:
    name = (run_dir / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    assert (run_dir / "checkpoints" / name / "manifest.json").is_file()
    return int(name.removeprefix("step_"))


@pytest.mark.parametrize(
    ("target", "number"),
    [
        ("rank 1", signal.SIGTERM),
        ("rank 0", signal.SIGUSR1),
        ("both", signal.SIGINT),
        ("launcher", signal.SIGTERM),
        ("launcher", signal.SIGUSR1),
        ("launcher", signal.SIGKILL),
        ("runner", signal.SIGTERM),
        ("runner", signal.SIGKILL),
    ],
)
def test_a_run_that_is_asked_to_stop_saves_and_leaves_no_process(run: Run, target: str, number: signal.Signals) -> None:
    asked = {
        "rank 0": [run.ranks[0]], "rank 1": [run.ranks[1]], "both": [run.ranks[0], run.ranks[1]],
        "launcher": [run.launcher], "runner": [psutil.Process(run.runner.pid)],
    }  # fmt: skip
    for process in asked[target]:
        process.send_signal(number)
    assert run.survivors() == [], run.text()
    assert last_saved(run.run_dir) == steps(run.run_dir)[-1] >= 2
    if target.startswith(("rank", "both")):
        assert run.runner.wait(10) == STOPPED
        assert f"checkpoint saved at step {last_saved(run.run_dir)}" in run.text()


def test_a_stopped_run_goes_on(assets: Path, run: Run) -> None:
    """By the same command; no step is missing, and none is there twice."""
    run.ranks[0].send_signal(signal.SIGTERM)
    assert run.survivors() == []
    saved = last_saved(run.run_dir)
    again = settings(assets, "llama", "parallel.tp_size=2", f"train.max_steps={saved + 3}")
    run_layout(2, [(str(run.run_dir), again)])
    assert steps(run.run_dir) == list(range(1, saved + 4))
    assert sorted({sample["step"] for sample in samples(run.run_dir)}) == steps(run.run_dir)


def test_checkpoints_of_every_so_many_steps_stay(assets: Path, tmp_path: Path) -> None:
    more = ("train.max_steps=7", "train.save_every=1", "checkpoint.keep_last=2", "checkpoint.keep_every=3")
    reduced = (*more, "checkpoint.keep_every_weights_only=true")
    folders = [
        (str(tmp_path / name), settings(assets, "llama", *words))
        for name, words in (("run", more), ("reduced", reduced))
    ]
    run_layout(1, folders)
    kept = {
        name: sorted(path.name for path in (tmp_path / name / "checkpoints").glob("*_*")) for name in ("run", "reduced")
    }
    assert kept == {"run": ["step_3", "step_6", "step_7"], "reduced": ["step_6", "step_7", "weights_3"]}
    weights = tmp_path / "reduced" / "checkpoints" / "weights_3"
    check_export(weights)
    same = tmp_path / "run" / "checkpoints" / "step_3" / "hf"
    assert {file.name: file.read_bytes() for file in weights.iterdir()} == {
        file.name: file.read_bytes() for file in same.iterdir()
    }
