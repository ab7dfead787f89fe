"""The process's place in the world: torch.distributed as a launcher, or nobody, set it up."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch

from megadistill.engines.ancestors import ancestors
from megadistill.engines.mpi_launch import mpi_variables
from megadistill.engines.rendezvous import meeting_store, name_interfaces
from megadistill.errors import TopologyError

_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SRUN_VARIABLES = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_NODELIST")


def srun_variables(environment: Mapping[str, str], first_host: Callable[[str], str]) -> dict[str, str]:
    """What a launcher would have set, for a rank that `srun` started itself; empty for any other process.

    `SLURM_STEP_NUM_TASKS` is of srun alone: a batch script and what it starts have none. MASTER_ADDR and MASTER_PORT
    that are set already stay; else the step's first host (``first_host`` of its node list; 127.0.0.1 when there is one
    node) and a port made of the job's number.
    """
    num_tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" in environment or num_tasks < 2:
        return {}
    missing = [name for name in _SRUN_VARIABLES if name not in environment]
    if missing:
        raise TopologyError(f"srun started this process but did not set {', '.join(missing)}")
    found = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(num_tasks),
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_PORT": str(20_000 + int(environment["SLURM_JOB_ID"]) % 20_000),
    }
    if "MASTER_ADDR" not in environment:
        is_one_node = environment.get("SLURM_STEP_NUM_NODES") == "1"
        found["MASTER_ADDR"] = "127.0.0.1" if is_one_node else first_host(environment["SLURM_STEP_NODELIST"])
    return {name: value for name, value in found.items() if name not in environment}


def _first_host(node_list: str) -> str:
    shown = subprocess.run(["scontrol", "show", "hostnames", node_list], capture_output=True, text=True, check=False)
    if shown.returncode or not shown.stdout.strip():
        raise TopologyError(f"scontrol cannot read the node list {node_list}; set MASTER_ADDR")
    return shown.stdout.split()[0]


def hostfile_of(words: Sequence[str]) -> str | None:
    """The hostfile that a command line names to DeepSpeed's runner; None without one and for other programs."""
    for place, word in enumerate(words[:4]):
        if Path(word).name in ("deepspeed", "ds") or word == "deepspeed.launcher.runner":
            parser = argparse.ArgumentParser(add_help=False)
            parser.add_argument("-H", "--hostfile")
            return parser.parse_known_args(words[place + 1 :])[0].hostfile
    return None


def _refuse_missing_hostfile() -> None:
    for above in ancestors():
        hostfile = hostfile_of(above.words)
        if hostfile is not None and not above.path(hostfile).is_file():
            raise TopologyError(f"there is no hostfile {hostfile}; deepspeed would train on this machine alone")


def world_size() -> int:
    """Number of processes that the launcher started; 1 without a launcher.

    Gives ranks of srun and mpirun the variables that other launchers set. Raises TopologyError for half a set-up and
    for a missing hostfile, of which DeepSpeed's runner only warns.
    """
    _refuse_missing_hostfile()
    os.environ |= srun_variables(os.environ, _first_host)
    os.environ |= mpi_variables(os.environ, _free_port)
    present = [name for name in _LAUNCHER_VARIABLES if name in os.environ]
    if present and len(present) < len(_LAUNCHER_VARIABLES):
        missing = [name for name in _LAUNCHER_VARIABLES if name not in os.environ]
        if "RANK" in present or "WORLD_SIZE" in present:
            raise TopologyError(f"the launcher set {', '.join(present)} but not {', '.join(missing)}")
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def distributed(timeout_s: float) -> Iterator[torch.device]:
    """Initialises torch.distributed through DeepSpeed (nccl on GPUs, gloo on CPU) and takes it down again.

    Without a launcher the process is a world of one on the loopback address. Yields this rank's device.
    """
    is_alone = world_size() == 1 and "RANK" not in os.environ
    if is_alone:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(_free_port())
    has_cuda = name_accelerator()
    import deepspeed

    from megadistill.engines.backend import leave_out_shm_op

    leave_out_shm_op()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch 2.13 renames; nothing a user could do about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_cuda else torch.device("cpu")
    if has_cuda:
        torch.cuda.set_device(device)
    backend, timeout = "nccl" if has_cuda else "gloo", timedelta(seconds=timeout_s)
    interfaces = name_interfaces(os.environ["MASTER_ADDR"])
    os.environ |= interfaces
    store = None if torch.distributed.is_initialized() else meeting_store(timeout)
    if store is not None:
        torch.distributed.init_process_group(
            backend,
            store=store,
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timeout,
            # As DeepSpeed does it, which takes over a group that is there.
            device_id=device if has_cuda and os.environ["WORLD_SIZE"] != "1" else None,
        )
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)
    try:
        yield device
        torch.distributed.barrier()
    finally:
        # Without this a rank of another node can abort at exit and leave its launcher waiting.
        torch.distributed.destroy_process_group()
        if is_alone:  # what is started from here is no rank of that world
            for name in (*_LAUNCHER_VARIABLES, "LOCAL_SIZE", *interfaces):
                os.environ.pop(name, None)


def name_accelerator() -> bool:
    """Whether there are GPUs. Where there are none DeepSpeed, which transformers imports too, is told instead of
    guessing."""
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        # cuDNN's attention makes a plan for every shape, 0.1 to 0.4 s each, and batches seldom have the same one twice.
        torch.backends.cuda.enable_cudnn_sdp(False)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return has_cuda


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
