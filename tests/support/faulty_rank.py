"""A rank of a launcher that runs `megadistill train` and, at one place of one step, misbehaves.

    FAULT=PLACE:STEP:RANK:ACTION  deepspeed ... tests/support/faulty_rank.py --config FILE ...

The fault happens inside the program, so that a test need not guess when the place is reached. Every rank first writes
its process number to FAULT_DIR/rank_N; the one that the fault is for writes FAULT_DIR/hit just before it acts.
"""

from __future__ import annotations

import errno
import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # instead of this folder, whose modules have names of libraries
# Where the places are: module, attribute (of a class, with a dot).
PLACES = {
    "start": ("megadistill.training.setup", "build_components"),
    "rollout": ("megadistill.generation.sources.on_policy", "OnPolicy.samples"),
    "backward": ("megadistill.engines.student", "Student.backward"),
    "save": ("megadistill.checkpoint.writer", "write_shard"),
    "hf": ("megadistill.checkpoint.whole_weights", "write_tensors"),
    "commit": ("megadistill.checkpoint.writer", "write_manifest"),
}


def act(action: str, folder: Path) -> None:
    """Makes the fault."""
    (folder / "hit").write_text(str(time.time()), encoding="utf-8")
    name, _, argument = action.partition("=")
    if name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif name == "kill_launcher":
        os.kill(os.getppid(), signal.SIGKILL)
    elif name == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif name == "sleep":
        time.sleep(float(argument))
    elif name == "full_disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif name == "crash":
        raise ValueError("a bug of ours")
    else:
        raise AssertionError(f"unknown action {action}")


def arm(place: str, step: int, action: str, folder: Path) -> None:
    """Wraps the function at ``place``: its call number ``step`` (1, 2, ...) makes the fault first."""
    import importlib

    module_name, path = PLACES[place]
    owner: Any = importlib.import_module(module_name)
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            act(action, folder)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def main() -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from megadistill.cli.main import main as command

    folder, rank = Path(os.environ["FAULT_DIR"]), os.environ["RANK"]
    (folder / f"rank_{rank}").write_text(str(os.getpid()), encoding="utf-8")
    place, step, victim, action = os.environ["FAULT"].split(":")
    if victim in (rank, "all"):
        arm(place, int(step), action, folder)
    return command(["train", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
