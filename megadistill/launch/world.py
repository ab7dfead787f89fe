"""torch.distributed for this process, with a launcher or without one."""

from __future__ import annotations

import ctypes
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from megadistill.launch.launchers import DEEPSPEED
from megadistill.launch.ranks import RANK_VARIABLES, set_rank_variables, unused_port
from megadistill.launch.rendezvous import meeting_store, name_interfaces

_MMAP_THRESHOLD, _MMAP_BYTES = -3, 2**22  # M_MMAP_THRESHOLD of glibc's malloc.h


@contextmanager
def distributed(timeout_s: float) -> Iterator[torch.device]:
    """Initializes torch.distributed through DeepSpeed (nccl on GPUs, gloo on CPU) and takes it down again.

    Without a launcher the process is a world of one on the loopback address.

    Args:
        timeout_s: Seconds after which a collective of the world fails.

    Yields:
        This rank's device.
    """
    is_alone = set_rank_variables() == 1 and DEEPSPEED.rank not in os.environ
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    if is_alone:
        os.environ |= alone | {"MASTER_PORT": str(unused_port())}
    device = default_device()
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        return_freed_memory()
    interfaces = name_interfaces(os.environ["MASTER_ADDR"])
    os.environ |= interfaces
    _initialize(device, timedelta(seconds=timeout_s))
    try:
        yield device
        torch.distributed.barrier()
    finally:
        from megadistill.launch.deepspeed_patches import destroy_process_groups

        # Without this a rank of another node can abort at exit and leave its launcher waiting.
        destroy_process_groups()
        if is_alone:  # what this process starts later is not a rank of that world
            for name in (*RANK_VARIABLES, *alone, *interfaces):
                os.environ.pop(name, None)


@contextmanager
def place_in_job() -> Iterator[tuple[int, int, torch.device]]:
    """This process's rank, the number of ranks, and its device; nothing communicates.

    Without a launcher the process is alone.
    """
    world_size = set_rank_variables()
    name_accelerator()
    device = default_device()
    if world_size == 1:
        yield 0, 1, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    interfaces = name_interfaces(os.environ["MASTER_ADDR"])
    os.environ |= interfaces
    try:
        yield int(os.environ["RANK"]), world_size, device
    finally:
        for name in interfaces:
            os.environ.pop(name, None)


def return_freed_memory() -> None:
    """Large tensors of a CPU give their memory back when they are freed.

    Glibc maps each at first, but after it has freed some, it takes those of up to 32 MB from its heap, which keeps what
    lies below one that is still used: a sixth of a run's memory. MALLOC_MMAP_THRESHOLD_ in the environment wins.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        set_option(_MMAP_THRESHOLD, _MMAP_BYTES)


def default_device() -> torch.device:
    """The device of a process on its own: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def name_accelerator() -> None:
    """Tells DeepSpeed by DS_ACCELERATOR where there is no GPU, which it would guess itself, with a warning.

    Call it before DeepSpeed, or what imports it (peft), is imported. On GPUs it switches cuDNN's attention off, which
    makes a plan for every shape, 0.1 to 0.4 s each: batches seldom have the same shape twice.
    """
    if default_device().type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    else:
        torch.backends.cuda.enable_cudnn_sdp(False)


def _initialize(device: torch.device, timeout: timedelta) -> None:
    name_accelerator()
    import deepspeed

    from megadistill.launch.deepspeed_patches import disable_shm_op, skip_memory_reports, skip_muon_compilation

    disable_shm_op()
    skip_muon_compilation()
    skip_memory_reports()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch 2.13 deprecates; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = None if torch.distributed.is_initialized() else meeting_store(timeout)
    if store is not None:
        torch.distributed.init_process_group(
            backend,
            store=store,
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timeout,
            # As DeepSpeed does it, which takes over a group that is there.
            device_id=device if device.type == "cuda" and os.environ["WORLD_SIZE"] != "1" else None,
        )
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)
