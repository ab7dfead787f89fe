"""``megadistill`` in a process without a launcher: the nested runs of the demo and of the study."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence

from megadistill.demo.waiting import POLL_S, Stopped, never
from megadistill.errors import ConfigError
from megadistill.launch.launchers import without_ranks


def run_alone(arguments: Sequence[str], is_stopping: Callable[[], bool] = never) -> None:
    """Runs ``megadistill ARGUMENTS`` as one process on all cores.

    Args:
        arguments: The verb and its arguments.
        is_stopping: Whether this process was asked to stop.

    Raises:
        Stopped: ``is_stopping()`` became true. The process was sent SIGTERM and has ended.
        ConfigError: It ended with an exit code other than 0.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = without_ranks(os.environ) | {"OMP_NUM_THREADS": str(cores)}
    process = subprocess.Popen([sys.executable, "-m", "megadistill", *arguments], env=environment)
    try:
        while process.poll() is None:
            if is_stopping():
                raise Stopped
            try:
                process.wait(POLL_S)
            except subprocess.TimeoutExpired:
                continue
    finally:
        # Also after Ctrl-C. A training run saves a checkpoint before it ends.
        if process.poll() is None:
            process.terminate()
            process.wait()
    if is_stopping():
        raise Stopped
    if process.returncode:
        raise ConfigError(f"megadistill {' '.join(arguments)} ended with exit code {process.returncode}")
