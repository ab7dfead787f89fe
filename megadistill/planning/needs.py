"""What a run needs at least, before it starts: its layout, and bytes of devices, hosts, and disk."""

from __future__ import annotations

from dataclasses import dataclass

from megadistill.config.schema import RunConfig
from megadistill.planning.case import Case, Models
from megadistill.planning.known import with_model_paths
from megadistill.planning.memory import resident
from megadistill.planning.storage import checkpoint_bytes, host_while_saving
from megadistill.training.setup import check_adapters, check_models, model_paths, run_tokenizer


@dataclass(frozen=True)
class Needs:
    """Lower bounds: activations, caches, and logits come on top.

    Attributes:
        tp_size: Tensor-parallel size.
        device_bytes: Of each process's device: what stays there between steps.
        host_bytes: Of each process's host memory: a checkpoint in the making.
        checkpoint_bytes: Of the disk, for each checkpoint.
    """

    tp_size: int
    device_bytes: int
    host_bytes: int
    checkpoint_bytes: int


def needs_of(config: RunConfig, world_size: int) -> Needs:
    """Checks models, tokenizers and layout, and computes what they need. No communication.

    Args:
        config: The configuration of the run.
        world_size: Number of processes.

    Raises:
        MegadistillError: A model or tokenizer cannot be used, or the processes cannot be divided like that.
    """
    check_adapters(config)
    tp_size = check_models(config, world_size)
    run_tokenizer(config)
    config = with_model_paths(config, model_paths(config))  # a model may be a run, whose student is in its checkpoint
    case = Case.of(config, Models.of(config), nodes=1, gpus_per_node=world_size, gpu_memory=0)
    return Needs(tp_size, sum(resident(case).values()), host_while_saving(case), checkpoint_bytes(case))
