"""What a run needs at least, before it starts: its layout, and bytes of devices, hosts, and disk, by docs/memory.md."""

from __future__ import annotations

from dataclasses import dataclass

from megadistill.config.schema import RunConfig
from megadistill.models.loading import DTYPES, load_model_config
from megadistill.models.model_size import num_parameters
from megadistill.training.setup import check_models, model_paths, run_tokenizer


@dataclass(frozen=True)
class Needs:
    """Lower bounds: activations, caches, and logits come on top.

    Attributes:
        tp_size: Tensor-parallel size.
        device_bytes: Of each process's device: weights, gradients, optimizer.
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
    tp_size = check_models(config, world_size)
    run_tokenizer(config)
    paths, stage = model_paths(config), config.parallel.zero_stage
    counts = {key: num_parameters(load_model_config(path, key)) for key, path in paths.items()}
    low = DTYPES[config.model.student.dtype].itemsize
    student, teacher = counts["model.student.path"], counts.get("model.teacher.path", 0)
    # ZeRO shares the optimizer from stage 1 on, gradients from 2, weights from 3.
    masters = 12 if low == 2 else 8
    shared = {0: 0, 1: masters, 2: masters + low, 3: masters + 2 * low}[stage]
    device = student * ((masters + 2 * low - shared) / tp_size + shared / world_size)
    device += teacher * DTYPES[config.model.teacher.dtype].itemsize / (world_size if stage == 3 else tp_size)
    extra = low if world_size > 1 else 0
    return Needs(tp_size, int(device), student * (12 + extra) // world_size, student * (12 + low))
