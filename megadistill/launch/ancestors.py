"""The processes above this one, as /proc shows them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PDSH = ("pdsh", "pdsh.bin")  # Debian starts it by a script


@dataclass(frozen=True)
class Ancestor:
    """``program`` is the kernel's name of it (at most 15 letters), ``words`` its command line, ``started`` the time
    that tells it from a later process of its number."""

    pid: int
    program: str
    started: str
    words: tuple[str, ...]

    def is_alive(self) -> bool:
        fields = _stat(self.pid)[1]
        return bool(fields) and fields[0] not in "ZX" and fields[19] == self.started

    def path(self, name: str) -> Path:
        """A file that it names relative to its working directory; to ours, which is inherited, where that is hidden."""
        try:
            return Path(os.readlink(f"/proc/{self.pid}/cwd")) / name
        except OSError:
            return Path(name)


def ancestors(pid: int | None = None) -> Iterator[Ancestor]:
    """From the parent (or from ``pid``) upwards, without the first process; nothing where there is no /proc."""
    pid = os.getppid() if pid is None else pid
    while pid > 1:
        program, fields = _stat(pid)
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
        except OSError:
            return
        if not fields:
            return
        yield Ancestor(pid, program, fields[19], tuple(words[:-1]))
        pid = int(fields[1])


def over_ssh(launcher: Ancestor) -> Iterator[Ancestor]:
    """The pdsh, and what is above it, that started DeepSpeed's per-node ``launcher`` through ssh from this machine:
    its command line holds the launcher's own, with the machines and the port of the job. Nothing on other machines."""
    job = [word for word in launcher.words if word.startswith(("--world_info=", "--master_port="))]
    if len(job) < 2:
        return
    for folder in Path("/proc").glob("[0-9]*"):
        found = next(ancestors(int(folder.name)), None)
        if found is not None and found.program in PDSH and all(word in " ".join(found.words) for word in job):
            yield from ancestors(found.pid)
            return


def _stat(pid: int) -> tuple[str, list[str]]:
    """Name and the fields after it; ("", []) for a process that is not there."""
    try:
        before, _, after = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")
    except OSError:
        return "", []
    return before.partition("(")[2], after.split()
