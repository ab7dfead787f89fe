"""A world of any size in one process: this process is one of its ranks, and collectives go nowhere."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch


@contextmanager
def dry_world(rank: int, world_size: int) -> Iterator[None]:
    """Initializes torch.distributed with torch's "fake" backend, and DeepSpeed above it.

    Meanwhile the environment says which rank this is, and DeepSpeed's checks of what other ranks hold are off.

    Args:
        rank: Which rank this process is.
        world_size: Processes in all.
    """
    ours = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size), "LOCAL_SIZE": "1"}
    ours |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    # What this process starts later is not a rank of that world.
    with mock.patch.dict(os.environ, ours):
        import deepspeed
        from torch.testing._internal.distributed.fake_pg import FakeStore

        from megadistill.launch.deepspeed_patches import (
            destroy_process_groups,
            disable_shm_op,
            skip_muon_compilation,
            trust_other_ranks,
        )

        disable_shm_op()
        skip_muon_compilation()
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        torch.distributed.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
        try:
            with trust_other_ranks():
                yield
        finally:
            destroy_process_groups()
