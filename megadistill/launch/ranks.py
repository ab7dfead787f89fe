"""RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, for every launcher of the table and for none."""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megadistill.errors import TopologyError
from megadistill.launch.ancestors import ancestors, command_line, path_of
from megadistill.launch.launchers import DEEPSPEED, MEETING_POINT, Launcher, launcher_of
from megadistill.launch.mpi import mpi_variables

RANK_VARIABLES = (DEEPSPEED.rank, DEEPSPEED.world_size, DEEPSPEED.local_rank, *MEETING_POINT)
_SLURM_JOB, _SLURM_NODES = "SLURM_JOB_ID", "SLURM_STEP_NODELIST"


def set_rank_variables() -> int:
    """Sets ``RANK_VARIABLES`` for a rank whose launcher has other names for them.

    Returns:
        Number of processes that the launcher started; 1 without a launcher.

    Raises:
        TopologyError: Some variables are set and others are not, or the hostfile does not exist (DeepSpeed's runner
            only warns of that).
    """
    _refuse_missing_hostfile()
    os.environ |= launcher_variables(os.environ)
    present = [name for name in RANK_VARIABLES if name in os.environ]
    missing = [name for name in RANK_VARIABLES if name not in os.environ]
    if missing and (DEEPSPEED.rank in present or DEEPSPEED.world_size in present):
        raise TopologyError(f"the launcher set {', '.join(present)} but not {', '.join(missing)}")
    return int(os.environ.get(DEEPSPEED.world_size, "1"))


def launcher_variables(
    environment: Mapping[str, str],
    *,
    first_host: Callable[[str], str] | None = None,
    free_port: Callable[[], int] | None = None,
) -> dict[str, str]:
    """The variables that ``environment`` lacks, for one of several ranks; empty for any other process.

    Args:
        environment: That of this process.
        first_host: First host of a SLURM node list; default: asks ``scontrol``.
        free_port: A free port; default: asks the system.

    Raises:
        TopologyError: The launcher did not set what it should have.
    """
    launcher = launcher_of(environment)
    if launcher is None:
        return {}
    if launcher.meeting_point == "mpi":
        return mpi_variables(int(environment[launcher.world_size]), environment, free_port or unused_port)
    slurm = (_SLURM_JOB, _SLURM_NODES) if launcher.meeting_point == "slurm" else ()
    missing = [name for name in (launcher.rank, launcher.local_rank, *slurm) if name not in environment]
    if missing:
        raise TopologyError(f"{launcher.name} started this process but did not set {', '.join(missing)}")
    found = _translated(launcher, environment)
    if slurm:
        found |= _slurm_meeting_point(environment, first_host or _first_host)
    return {name: value for name, value in found.items() if name not in environment}


def _translated(launcher: Launcher, environment: Mapping[str, str]) -> dict[str, str]:
    names = {
        DEEPSPEED.rank: launcher.rank,
        DEEPSPEED.world_size: launcher.world_size,
        DEEPSPEED.local_rank: launcher.local_rank,
    }
    return {ours: environment[theirs] for ours, theirs in names.items()}


def _slurm_meeting_point(environment: Mapping[str, str], first_host: Callable[[str], str]) -> dict[str, str]:
    """The step's first host (127.0.0.1 where it has one node), and a port made of the job's number."""
    found = {"MASTER_PORT": str(20_000 + int(environment[_SLURM_JOB]) % 20_000)}
    if "MASTER_ADDR" not in environment:
        is_one_node = environment.get("SLURM_STEP_NUM_NODES") == "1"
        found["MASTER_ADDR"] = "127.0.0.1" if is_one_node else first_host(environment[_SLURM_NODES])
    return found


def _first_host(node_list: str) -> str:
    done = subprocess.run(["scontrol", "show", "hostnames", node_list], capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.strip():
        raise TopologyError(f"scontrol cannot read the node list {node_list}; set MASTER_ADDR")
    return done.stdout.split()[0]


def hostfile_of(words: Sequence[str]) -> str | None:
    """The hostfile in a command line of DeepSpeed's runner; None without one and for other programs."""
    for place, word in enumerate(words[:4]):
        if Path(word).name in ("deepspeed", "ds") or word == "deepspeed.launcher.runner":
            parser = argparse.ArgumentParser(add_help=False)
            parser.add_argument("-H", "--hostfile")
            hostfile: str | None = parser.parse_known_args(words[place + 1 :])[0].hostfile
            return hostfile
    return None


def _refuse_missing_hostfile() -> None:
    for process in ancestors():
        hostfile = hostfile_of(command_line(process))
        if hostfile is not None and not path_of(process, hostfile).is_file():
            raise TopologyError(f"no such hostfile: {hostfile}; deepspeed would train on this machine alone")


def unused_port() -> int:
    """A free port of the loopback address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
