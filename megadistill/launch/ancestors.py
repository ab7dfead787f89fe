"""The processes above this one, where the system shows them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from megadistill.launch.launchers import DEEPSPEED, is_launcher


def ancestors(process: psutil.Process | None = None) -> list[psutil.Process]:
    """The parent of this process (or ``process`` itself) and all above it, without the first process of the system."""
    try:
        above = psutil.Process().parents() if process is None else [process, *process.parents()]
    except psutil.Error:
        return []
    return [parent for parent in above if parent.pid > 1]


def command_line(process: psutil.Process) -> list[str]:
    """The words of a process's command line; empty where it has ended or is hidden."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def is_alive(process: psutil.Process) -> bool:
    """Whether a process still runs; a zombie does not, nor does one whose process id is used again."""
    try:
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def path_of(process: psutil.Process, name: str) -> Path:
    """A file that ``process`` names, relative to its working directory.

    Where that is hidden, relative to ours, which we inherited.
    """
    try:
        return Path(process.cwd()) / name
    except (psutil.Error, OSError):
        return Path(name)


def launchers_above() -> list[psutil.Process]:
    """The ancestors that are launchers, also through ssh on this machine."""
    above = ancestors()
    beyond = [process for launcher in above for process in _over_ssh(launcher)]
    return [process for process in (*above, *beyond) if _is_launcher(process)]


def _is_launcher(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return is_launcher(process.name(), command_line(process))
    return False


def _over_ssh(launcher: psutil.Process) -> Sequence[psutil.Process]:
    """The pdsh that started DeepSpeed's per-node ``launcher`` through ssh, and all above it; nothing on other machines.

    Its command line holds the launcher's machines and port.
    """
    job = [word for word in command_line(launcher) if word.startswith(("--world_info=", "--master_port="))]
    if len(job) < 2:
        return []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.name() in DEEPSPEED.programs and all(word in " ".join(process.cmdline()) for word in job):
                return ancestors(process)
    return []
