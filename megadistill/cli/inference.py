"""What ``generate`` and ``evaluate`` share: where a model is found, and the processes that run it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megadistill.checkpoint.manifest import HF_FOLDER, LATEST, MANIFEST, find_checkpoint
from megadistill.cli.parsing import ask_hub_only_if_there
from megadistill.config.schema import ParallelSection
from megadistill.errors import CheckpointError
from megadistill.launch.heartbeat import lost_ranks_reported
from megadistill.launch.ranks import set_rank_variables
from megadistill.launch.world import default_device, distributed, name_accelerator
from megadistill.models.families import head_counts
from megadistill.models.loading import load_model_config
from megadistill.parallel.context import ParallelContext
from megadistill.parallel.topology import resolve_tp_size


def model_folder(path: str) -> str:
    """A model folder or hub name as it is; a checkpoint or run directory becomes its Hugging Face folder."""
    ask_hub_only_if_there([path])
    local = Path(path)
    if not local.is_dir() or (local / "config.json").exists():
        return path
    if any((folder / name).exists() for folder in (local, local / "checkpoints") for name in (LATEST, MANIFEST)):
        folder = find_checkpoint(local) / HF_FOLDER
        if not folder.is_dir():
            raise CheckpointError(f"{path} holds no model: {folder} is missing")
        return str(folder)
    return path


@contextmanager
def inference_context(parallel: ParallelSection, models: dict[str, str]) -> Iterator[ParallelContext]:
    """The processes of a launcher, or this one. ``models`` maps a name for messages to a model's path."""
    name_accelerator()
    num_ranks = set_rank_variables()
    counts = [n for name, path in models.items() for n in head_counts(load_model_config(path, name), name)]
    tp_size = resolve_tp_size(parallel.tp_size, num_ranks, counts)
    if num_ranks == 1:
        yield ParallelContext.single(default_device())
        return
    with distributed(parallel.timeout_s) as device:
        context = ParallelContext.build(tp_size, parallel.timeout_s, device)
        with lost_ranks_reported(context):
            yield context
