"""Runs on a real terminal: one that is closed, and one whose session leader is the launcher itself."""

from __future__ import annotations

import os
import pty
import select
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.launched import alive, command_of, environment_of
from tests.support.runs import ROOT, settings

_SHELL = ["bash", "--norc", "--noprofile", "-i"]


class Terminal:
    """A pseudo-terminal with the process that leads its session, and every process that was started there."""

    def __init__(self, words: Sequence[str]) -> None:
        self.text = b""
        pid, self._master = pty.fork()
        if pid == 0:
            os.chdir(ROOT)
            os.execvpe(words[0], list(words), environment_of())
        self.leader = psutil.Process(pid)

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def wait(self, is_done: Callable[[], bool], seconds: float = 120) -> bool:
        """Reads what is printed until ``is_done()``, or for some time; whether it is done."""
        deadline = time.monotonic() + seconds
        while not is_done():
            if time.monotonic() > deadline:
                return False
            if self._master >= 0 and select.select([self._master], [], [], 0.1)[0]:
                with suppress(OSError):  # everybody has left the terminal
                    self.text += os.read(self._master, 1 << 16)
            time.sleep(0.02)
        return True

    def close(self) -> None:
        """Closes the window."""
        if self._master >= 0:
            os.close(self._master)
        self._master = -1


@pytest.fixture
def started() -> Iterator[list[psutil.Process]]:
    """Processes to end after a test."""
    processes: list[psutil.Process] = []
    yield processes
    for process in alive(processes):
        process.kill()
    for process in processes[:1]:  # ours to reap
        with suppress(ChildProcessError):
            os.waitpid(process.pid, 0)


def endless(assets: Path, tp_size: int, *more: str) -> list[str]:
    words = ["train.max_steps=100000", f"parallel.tp_size={tp_size}", "train.stop_grace_s=30", *more]
    return settings(assets, "llama", *words)


def num_steps(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return len(metrics.read_text(encoding="utf-8").splitlines()) if metrics.exists() else 0


def last_saved(run_dir: Path) -> int:
    latest = run_dir / "checkpoints" / "latest"
    return int(latest.read_text(encoding="utf-8").strip().removeprefix("step_")) if latest.is_file() else 0


@pytest.mark.parametrize("leader", ["a shell", "deepspeed"])
def test_a_run_whose_terminal_goes_away_is_saved(
    leader: str, assets: Path, tmp_path: Path, started: list[psutil.Process]
) -> None:
    """A closed window, and Ctrl-C where deepspeed leads the session: it dies, and the kernel hangs up the ranks."""
    run_dir = tmp_path / "run"
    # A step of seconds: deepspeed is gone before it is finished.
    more = endless(assets, 2, "train.global_batch_size=24", "train.samples_every=0")
    command = command_of(ROOT / "launchers" / "run.sh", run_dir, more)
    terminal = Terminal(_SHELL if leader == "a shell" else command)
    started.append(terminal.leader)
    if leader == "a shell":
        terminal.type(f"{shlex.join(command)}\n".encode())
    assert terminal.wait(lambda: num_steps(run_dir) >= 1), terminal.text.decode()
    started += terminal.leader.children(recursive=True)
    terminal.close() if leader == "a shell" else terminal.type(b"\x03")
    is_over = terminal.wait(lambda: not alive(started), 150)
    saved = f"{num_steps(run_dir)} steps, the last saved one is {last_saved(run_dir)}"
    assert is_over, f"{saved}; alive: {alive(started)}; {terminal.text.decode()}"
    terminal.close()
    # The signal may come between two steps: the step in flight is then none.
    assert last_saved(run_dir) == num_steps(run_dir) >= 1, terminal.text.decode()


def test_a_run_under_nohup_goes_on_when_its_terminal_is_closed(
    assets: Path, tmp_path: Path, started: list[psutil.Process]
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    base = str(ROOT / "configs" / "base.yaml")
    command = [sys.executable, "-m", "megadistill", "train", "--config", base, f"run.dir={run_dir}"]
    terminal = Terminal(_SHELL)
    started.append(terminal.leader)
    terminal.type(f"nohup {shlex.join([*command, *endless(assets, 1)])} > {shlex.quote(str(log))} 2>&1\n".encode())
    assert terminal.wait(lambda: num_steps(run_dir) >= 2), terminal.text.decode()
    started += terminal.leader.children(recursive=True)
    terminal.close()
    assert terminal.wait(lambda: not alive(started[:1])), "the shell is still there"
    steps = num_steps(run_dir)
    assert terminal.wait(lambda: num_steps(run_dir) >= steps + 3), log.read_text(encoding="utf-8")
    for process in alive(started):
        process.send_signal(signal.SIGTERM)
    assert terminal.wait(lambda: not alive(started), 60)
    assert last_saved(run_dir) == num_steps(run_dir), log.read_text(encoding="utf-8")
