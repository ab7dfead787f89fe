"""Runs of two ranks by the real deepspeed launcher, and their processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import psutil

from tests.support.runs import ROOT, free_port


def command_of(script: Path, run_dir: Path, settings: Sequence[str]) -> list[str]:
    """deepspeed's command for two ranks of ``script`` on configs/base.yaml with overrides."""
    command = [str(Path(sys.executable).parent / "deepspeed"), "--log_level", "warning", "--num_gpus", "2"]
    command += ["--master_port", free_port(), str(script), "--config", str(ROOT / "configs" / "base.yaml")]
    return [*command, f"run.dir={run_dir}", *settings]


def environment_of(**variables: str) -> dict[str, str]:
    """That of a run of two ranks on CPUs."""
    return os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | variables


def launch(
    script: Path, run_dir: Path, settings: Sequence[str], log: IO[str], **variables: str
) -> subprocess.Popen[bytes]:
    """Starts ``command_of``; ``variables`` join the environment."""
    words, environment = command_of(script, run_dir, settings), environment_of(**variables)
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; a zombie does not."""
    found = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found
