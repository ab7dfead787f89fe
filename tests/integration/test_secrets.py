"""Whole processes with a token in the environment: grep everything that they print and write."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import settings

ROOT = Path(__file__).resolve().parents[2]
SECRET = "hf_something_secret"
PASSWORD = "pass-of-the-proxy"


def _run(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """``code`` in a process whose environment holds a token and a password for the hub; no server has its address."""
    folder.mkdir()
    environment = {**os.environ, "HF_TOKEN": SECRET, "HF_ENDPOINT": f"http://me:{PASSWORD}@127.0.0.1:9"}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", f"import sys\nfrom megadistill.cli.main import main\n{code}"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def _check_silence(done: subprocess.CompletedProcess[str], folder: Path) -> None:
    written = [file.read_bytes().decode(errors="replace") for file in folder.rglob("*") if file.is_file()]
    for text in (done.stdout, done.stderr, *written):
        assert SECRET not in text and PASSWORD not in text


TRAIN = (
    "['train', '--config', %r, 'run.dir=run', 'model.tokenizer=./t', 'model.student.path=%s', 'model.teacher.path=%s']"
)


@pytest.mark.parametrize("model", [f"./{SECRET}", f"./{SECRET}/a/b", f"owner/{SECRET}"])
def test_models_that_cannot_be_had(tmp_path: Path, model: str) -> None:
    """No such folder, and a hub name: the message repeats the name, and transformers' may repeat the address."""
    arguments = TRAIN % (str(ROOT / "configs" / "base.yaml"), model, model)
    done = _run(tmp_path / "x", f"sys.exit(main({arguments}))")
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("megadistill: ")]
    assert len(lines) == 1 and "***" in lines[0] and "Traceback" not in done.stderr
    if model.startswith("owner"):
        assert "Retrying" in done.stderr and "http://***@127.0.0.1:9" in done.stderr
    _check_silence(done, tmp_path)


CRASH = """
import os, threading, megadistill.cli.export
def fail(*_):
    raise RuntimeError(f"in a crash: {os.environ['HF_TOKEN']} {os.environ['HF_ENDPOINT']}")
megadistill.cli.export.run = fail
"""


def test_a_crash(tmp_path: Path) -> None:
    done = _run(tmp_path / "x", f"{CRASH}\nsys.exit(main(['export', 'a', 'b']))")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "RuntimeError: in a crash: *** http://***@127.0.0.1:9" in done.stderr
    _check_silence(done, tmp_path)


def test_a_crash_in_a_thread(tmp_path: Path) -> None:
    done = _run(tmp_path / "x", f"{CRASH}\nmain(['--help'])\nt = threading.Thread(target=fail)\nt.start()\nt.join()")
    assert "RuntimeError: in a crash: ***" in done.stderr
    _check_silence(done, tmp_path)


def test_a_whole_run_leaves_no_secret(assets: Path, tmp_path: Path) -> None:
    """One step: log, metrics, events, resolved.yaml, checkpoint and exported model."""
    overrides = settings(assets, "llama", "run.dir=run", "train.max_steps=1")
    arguments = ["train", "--config", str(ROOT / "configs" / "base.yaml"), *overrides]
    done = _run(tmp_path / "x", f"sys.exit(main({arguments!r}))")
    assert done.returncode == 0, done.stderr
    assert len([file for file in (tmp_path / "x" / "run").rglob("*") if file.is_file()]) > 10
    _check_silence(done, tmp_path)
