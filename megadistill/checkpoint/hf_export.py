"""A partitioned student as a Hugging Face folder: standard names, shapes and layout, so that anything else can load
it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from megadistill.checkpoint.manifest import (
    HF_FOLDER,
    STUDENT_FOLDER,
    check_files,
    find_checkpoint,
    new_folder,
    read_manifest,
)
from megadistill.data.tokenize import tokenizes_otherwise
from megadistill.engines.teacher import PartitionedModel
from megadistill.errors import CheckpointError
from megadistill.models.families import FAMILIES
from megadistill.models.loading import DTYPES, LoadedModel, is_sharded
from megadistill.models.shards import MASTER, HFWeights, ShardReader, save_tensors
from megadistill.observability.log import get_logger
from megadistill.observability.progress import progress_bar

_MAX_SHARD_BYTES = 4 << 30
_INDEX = "model.safetensors.index.json"


def write_student(
    shards: ShardReader, student: PartitionedModel, dtype: torch.dtype, folder: Path, tokenizer: Any
) -> None:
    """Writes weights (safetensors, cut at 4 GiB), configuration, generation configuration and tokenizer.

    From the files of all ranks: nothing communicates, and at most one file's worth of weights is held in memory.
    """
    loaded = student.loaded
    folder.mkdir(parents=True, exist_ok=True)
    whole = ((name, shards.whole(MASTER, name).to(dtype)) for name in shards.cuts)
    write_safetensors(((name, _standard_layout(name, tensor, loaded)) for name, tensor in whole), folder)
    _write_configuration(loaded, student, folder, tokenizer)
    tokenizer.save_pretrained(folder)
    if tokenizes_otherwise(folder):
        get_logger().warning(
            f"{folder}: AutoTokenizer cuts text otherwise than this run did, because it takes its own class for "
            f"{loaded.config.model_type}; elsewhere load PreTrainedTokenizerFast (megadistill does)"
        )


def write_safetensors(
    tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, max_shard_bytes: int | None = None
) -> None:
    """Writes ``model.safetensors``, or numbered files with an index when it would pass ``max_shard_bytes`` (4 GiB)."""
    limit = max_shard_bytes or _MAX_SHARD_BYTES
    files: list[Path] = []
    weight_map: dict[str, int] = {}
    current: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        files.append(folder / f"shard-{len(files)}.partial")
        save_tensors(current, files[-1])
        current.clear()

    for name, tensor in tensors:
        bytes_ = tensor.numel() * tensor.element_size()
        if current and size + bytes_ > limit:
            flush()
            size = 0
        current[name], weight_map[name] = tensor.contiguous(), len(files)
        size, total = size + bytes_, total + bytes_
    flush()
    if len(files) == 1:
        files[0].replace(folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for file, name in zip(files, names, strict=True):
        file.replace(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {n: names[i] for n, i in weight_map.items()}}
    (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _standard_layout(name: str, tensor: torch.Tensor, loaded: LoadedModel) -> torch.Tensor:
    """The family's own layout, with the padded vocabulary rows that were cut at loading put back."""
    if name in loaded.removed_rows:
        tensor = torch.cat([tensor, loaded.removed_rows[name].to(tensor)])
    return tensor if loaded.family.export is None else loaded.family.export(name, tensor)


def _write_configuration(loaded: LoadedModel, student: PartitionedModel, folder: Path, tokenizer: Any) -> None:
    from transformers import GenerationConfig

    config = copy.deepcopy(loaded.config)
    config.architectures = [type(student.module).__name__]
    config.dtype = next(student.module.parameters()).dtype
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(config, name, None) is None or getattr(config, name) != getattr(tokenizer, name):
            setattr(config, name, getattr(tokenizer, name))
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)


def export_checkpoint(
    checkpoint: str | Path, folder: str | Path, *, dtype: str | None = None, max_shard_bytes: int | None = None
) -> Path:
    """Writes the student of a checkpoint (or of a run's latest one) to ``folder``, checked against its manifest.

    The weights come from the optimizer's float32 ones: ``dtype`` fp32 loses nothing of them, bf16 rounds them once;
    default: as they were trained. No file is larger than ``max_shard_bytes`` (4 GiB) unless one tensor is. Raises
    CheckpointError for a broken checkpoint or a folder that is not empty; nothing is left behind then. Needs no
    processes and no GPU, and holds one file's worth of weights.
    """
    if is_sharded(str(checkpoint)):
        raise CheckpointError(
            f"{checkpoint} is a model cut into shards and no checkpoint; take the model it was made from"
        )
    source, target = find_checkpoint(Path(checkpoint)), Path(folder)
    manifest = read_manifest(source)
    names = [name for name in manifest["files"] if name.startswith((f"{HF_FOLDER}/", f"{STUDENT_FOLDER}/"))]
    if not names:
        raise CheckpointError(f"{source} holds no exportable model")
    for name in progress_bar(names, description="check", unit="file"):
        check_files(source, manifest, [name])
    with new_folder(target) as beside:
        for file in (source / HF_FOLDER).iterdir():
            if file.suffix != ".safetensors" and file.name != _INDEX:
                shutil.copy2(file, beside)
        config = json.loads((beside / "config.json").read_text())
        config["dtype"] = config["dtype"] if dtype is None else str(DTYPES[dtype]).removeprefix("torch.")
        (beside / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_safetensors(_masters(source, config, getattr(torch, config["dtype"])), beside, max_shard_bytes)
    return source


def _masters(source: Path, config: dict[str, Any], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole weights in the family's layout; rows that were never trained come from hf/."""
    shards, exported = ShardReader(source / STUDENT_FOLDER), HFWeights(source / HF_FOLDER)
    export = FAMILIES[config["model_type"]].export
    for name in progress_bar(list(shards.cuts), description="export", unit="tensor"):
        tensor = shards.whole(MASTER, name)
        tensor = tensor if export is None else export(name, tensor)
        if len(tensor) < exported.shape(name)[0]:
            tensor = torch.cat([tensor, exported.read(name)[len(tensor) :].to(tensor)])
        yield name, tensor.to(dtype)


def check_export(folder: str | Path) -> None:
    """Loads an exported folder with plain transformers. Raises CheckpointError when weights are missing or left
    over."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(folder)
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    wrong = {name: sorted(keys) for name, keys in info.items() if name != "error_msgs" and keys}
    if wrong:
        raise CheckpointError(f"{folder}: transformers reports {wrong}")
