"""The adapters of a checkpoint: their proof, and their export."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megadistill.checkpoint.hf_files import copy_beside, set_tied, write_safetensors
from megadistill.checkpoint.manifest import HF_FOLDER, STUDENT_FOLDER
from megadistill.checkpoint.probe import check_same_logits, folder_logits, streamed_logits
from megadistill.config.lora import LoraSection
from megadistill.errors import CheckpointError
from megadistill.models.adapter_files import ADAPTER_WEIGHTS, PREFIX, AdapterFolder
from megadistill.models.folder_checks import ADAPTER_BASE, ADAPTER_CONFIG
from megadistill.models.loading import DTYPES, LoadedModel, load_model, load_model_config
from megadistill.models.lora import with_adapters
from megadistill.models.shard_spec import ShardSpec
from megadistill.models.shards import MASTER, WEIGHT, ShardReader
from megadistill.models.tensor_file import save_tensors
from megadistill.observability.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def has_adapters(checkpoint: Path) -> bool:
    """Whether a checkpoint is one of adapters."""
    return (checkpoint / HF_FOLDER / ADAPTER_BASE).is_file()


def export_adapters(checkpoint: Path, folder: Path, *, dtype: str | None) -> None:
    """Writes the adapters of a checkpoint as a folder that peft reads, with what lies beside them.

    Args:
        checkpoint: The checkpoint, whose files have been checked.
        folder: Exists, and is empty.
        dtype: fp32 or bf16; default: as they were trained.

    Raises:
        CheckpointError: What was written is another model on the probe text.
    """
    hf, shards = checkpoint / HF_FOLDER, ShardReader(checkpoint / STUDENT_FOLDER)
    wanted = DTYPES[dtype or _dtype_name(load_model_config(str(hf), str(checkpoint)))]
    copy_beside(hf, folder, dtype=wanted)
    tensors = {PREFIX + name: shards.whole(MASTER, name).to(wanted).contiguous() for name in shards.shard_specs}
    save_tensors(tensors, folder / ADAPTER_WEIGHTS)
    own = AdapterFolder.of(str(hf), str(checkpoint))
    assert own is not None
    prove_adapters(shards, own.config, folder, checkpoint)


def export_merged(checkpoint: Path, folder: Path, *, dtype: str | None, max_shard_bytes: int | None) -> None:
    """Writes the model of a checkpoint of adapters: every adapted weight is W + s B A, computed in float32.

    Args:
        checkpoint: The checkpoint, whose files have been checked.
        folder: Exists, and is empty.
        dtype: fp32 or bf16; default: as it was trained.
        max_shard_bytes: Largest file unless one tensor is larger.

    Raises:
        CheckpointError: What was written is another model on the probe text.
    """
    hf = checkpoint / HF_FOLDER
    config = load_model_config(str(hf), str(checkpoint))
    wanted = DTYPES[dtype or _dtype_name(config)]
    copy_beside(hf, folder, dtype=wanted, leaves=(ADAPTER_CONFIG, ADAPTER_BASE))
    with tempfile.TemporaryDirectory() as exact:
        export_adapters(checkpoint, Path(exact), dtype="fp32")  # hf/ has them in the type that they are trained in
        loaded = load_model(
            exact, dtype="fp32", vocab_size=config.vocab_size, seed=0, attention="eager", where=str(checkpoint), rank=1
        )
        write_safetensors(_whole(loaded, wanted), folder, max_shard_bytes)
        set_tied(folder, loaded.shapes)
        expected = streamed_logits(loaded, config.vocab_size)
    check_same_logits(expected, folder_logits(folder, config.vocab_size), checkpoint, wanted)


def _whole(loaded: LoadedModel, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    assert loaded.weights is not None
    for name, shape in progress_bar(list(loaded.shapes.items()), description="export", unit="tensor"):
        run = loaded.weights.read(WEIGHT, name, ShardSpec(shape), 0, 0, torch.Size(shape).numel())
        yield loaded.family.stored_name(name), loaded.family.export(name, run.view(shape)).to(dtype).contiguous()


def prove_adapters(shards: ShardReader, lora: LoraSection, folder: Path, source: object) -> None:
    """Compares base and adapters of an exported folder, merged, with the student's own beside the base's layers.

    One module has its weights in memory at a time.

    Args:
        shards: The student as it was saved.
        lora: Rank and scale.
        folder: The exported folder.
        source: The student, for the message.

    Raises:
        CheckpointError: The folder is another model, or cannot be loaded.
    """
    config = load_model_config(str(folder), str(source))
    adapters = AdapterFolder.of(str(folder), str(source))
    if adapters is None:
        raise CheckpointError(f"{source}: {folder} has no adapters")
    base = with_adapters(
        _opened(adapters.base, config), lora, seed=0, where=str(source), base=adapters.base, trained=(shards, MASTER)
    )
    expected = streamed_logits(base, config.vocab_size)
    found = streamed_logits(_opened(str(folder), config), config.vocab_size)
    check_same_logits(expected, found, source, DTYPES[_dtype_name(config)])


def _opened(path: str, config: PreTrainedConfig) -> LoadedModel:
    return load_model(
        path, dtype=_dtype_name(config), vocab_size=config.vocab_size, seed=0, attention="eager", where=path, rank=1
    )


def _dtype_name(config: Any) -> str:
    return next(name for name, dtype in DTYPES.items() if dtype == config.dtype)
