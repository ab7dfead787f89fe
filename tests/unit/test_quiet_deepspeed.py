"""The launcher of a single machine: its messages go to a file, and an error is still seen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megadistill.errors import ConfigError
from megadistill.launch.launchers import is_launcher
from megadistill.launch.quiet_deepspeed import _devices, main

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ["--config", "configs/smoke.yaml"]


def launched(tmp_path: Path, program: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Two processes of a program that does not train."""
    script = tmp_path / "program.py"
    script.write_text("import os, signal, sys\n" + program, encoding="utf-8")
    words = [sys.executable, "-u", "-m", "megadistill.launch.quiet_deepspeed", "2", "29999", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    words += [*SMOKE, f"run.dir={tmp_path / 'run'}", *overrides]
    return subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_messages_go_to_the_run_and_exit_codes_come_back(tmp_path: Path) -> None:
    done = launched(tmp_path, "os.write(1, b'rank\\n'); sys.exit(85)")
    assert done.returncode == 85 and done.stderr == ""
    assert set(done.stdout.splitlines()) <= {"rank"}
    log = (tmp_path / "run" / "launcher.log").read_text(encoding="utf-8")
    assert "spawned with command" in log and "exits with return code = 85" in log


def test_a_crash_is_shown_with_the_place_of_the_log(tmp_path: Path) -> None:
    done = launched(tmp_path, "raise RuntimeError('mine')")
    assert done.returncode == 1 and "RuntimeError: mine" in done.stderr
    assert f"a process ended with 1; the launcher's log is {tmp_path / 'run' / 'launcher.log'}" in done.stderr
    killed = launched(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    assert "a process ended with -9 (signal 9); the launcher's log" in killed.stderr


def test_a_wrong_configuration_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["2", "1", "no program", *SMOKE, "train.max_stepz=2", "run.dir=run"]) == 2
    assert capsys.readouterr().err == (
        "megadistill: command line: train.max_stepz: unknown key; did you mean train.max_steps?\n"
    )
    assert not Path("run").exists()


def test_processes_get_the_visible_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-3,5")
    assert _devices("gpus", 3) == [2, "GPU-3", 5] and _devices("2", 3) == [2, "GPU-3"]
    assert _devices("4", 0) == [0, 1, 2, 3], "on the CPU they are only numbers"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert _devices("2", 8) == [0, 1] and _devices("gpus", 2) == [0, 1]


@pytest.mark.parametrize(
    ("processes", "num_gpus", "message"),
    [
        ("gpus", 0, "torch finds no GPU here; NPROC=N starts N processes"),
        ("4", 3, "NPROC=4, but torch finds 3 GPUs here; every process needs one"),
        ("two", 3, "NPROC=two is no number of processes; it must be 1 or more"),
        ("0", 0, "NPROC=0 is no number of processes; it must be 1 or more"),
    ],
)
def test_numbers_of_processes_that_cannot_be(processes: str, num_gpus: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _devices(processes, num_gpus)
    assert str(caught.value) == message


def test_a_number_of_processes_leaves_the_gpus_to_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NPROC=N on a machine with GPUs starts N ranks on them, not on its CPU."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("deepspeed.launcher.launch.main", lambda: None)
    monkeypatch.setattr("deepspeed.utils.logger.handlers", [])
    monkeypatch.setattr(sys, "argv", [])
    assert main(["2", "29999", "program", *SMOKE, f"run.dir={tmp_path}"]) == 0
    assert "DS_ACCELERATOR" not in os.environ and "program" in sys.argv


def test_a_log_that_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "launcher.log").mkdir()
    assert main(["2", "29999", "program", *SMOKE, f"run.dir={tmp_path}"]) == 2
    assert capsys.readouterr().err == f"megadistill: {tmp_path / 'launcher.log'} cannot be written: Is a directory\n"


def test_its_death_is_that_of_a_launcher() -> None:
    assert is_launcher("python3", ["python3", "-u", "-m", "megadistill.launch.quiet_deepspeed", "2"])
