"""A partitioned student as a Hugging Face folder, with standard names, shapes and layout, which any tool can load."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megadistill.checkpoint.carried import Carried
from megadistill.checkpoint.manifest import (
    HF_FOLDER,
    STUDENT_FOLDER,
    check_with_progress,
    find_checkpoint,
    new_folder,
    read_manifest,
)
from megadistill.errors import CheckpointError
from megadistill.models.families import FAMILIES, Family
from megadistill.models.loading import DTYPES, LoadedModel, is_sharded
from megadistill.models.shards import MASTER, HFWeights, ShardReader, save_tensors
from megadistill.observability.progress import progress_bar

if TYPE_CHECKING:  # it loads DeepSpeed, which none of the tools needs
    from megadistill.engines.partitioned import PartitionedModel

_MAX_SHARD_BYTES = 4 << 30
_INDEX = "model.safetensors.index.json"


def write_student(
    shards: ShardReader,
    student: PartitionedModel,
    dtype: torch.dtype,
    folder: Path,
    carried: Carried,
) -> None:
    """Writes weights (safetensors, at most 4 GiB per file), configuration, and the files beside them.

    It reads the files of all ranks: nothing communicates, and the weights of one file are in memory at a time.
    """
    loaded = student.loaded
    folder.mkdir(parents=True, exist_ok=True)
    removed = loaded.removed_rows
    weights = _standard_weights(shards, shards.shard_specs, loaded.family, dtype, lambda name, _: removed.get(name))
    write_safetensors(weights, folder)
    _write_configuration(loaded, student, folder, carried)
    carried.write(folder)


def write_safetensors(
    tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, max_shard_bytes: int | None = None
) -> None:
    """Writes ``model.safetensors``, or numbered files with an index where it would exceed ``max_shard_bytes`` (4 GiB).

    Only the tensors of one file are in memory (``huggingface_hub`` would need all of them at once).
    """
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
    (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _standard_weights(
    shards: ShardReader,
    names: Iterable[str],
    family: Family,
    dtype: torch.dtype,
    removed: Callable[[str, int], torch.Tensor | None],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole weights in the family's own layout.

    ``removed(name, number of rows)``: the padded vocabulary rows after these, which were removed at loading and never
    trained; None without any.
    """
    for name in names:
        tensor = shards.whole(MASTER, name)
        tensor = tensor if family.export is None else family.export(name, tensor)
        rows = removed(name, len(tensor))
        yield name, (tensor if rows is None else torch.cat([tensor, rows.to(tensor)])).to(dtype)


def _write_configuration(loaded: LoadedModel, student: PartitionedModel, folder: Path, carried: Carried) -> None:
    config = copy.deepcopy(loaded.config)
    config.architectures = [type(student.module).__name__]
    config.dtype = next(student.module.parameters()).dtype
    for name, value in carried.special_ids.items():
        setattr(config, name, value)
    config.save_pretrained(folder)


def export_checkpoint(
    checkpoint: str | Path, folder: str | Path, *, dtype: str | None = None, max_shard_bytes: int | None = None
) -> Path:
    """Writes the student of a checkpoint to a folder, checked against the manifest. One process, no GPU.

    Args:
        checkpoint: A checkpoint, or a run directory: its latest one.
        folder: Must not exist, or be empty.
        dtype: The weights come from the optimizer's float32 ones: fp32 keeps them, bf16 rounds them once; default: as
            they were trained.
        max_shard_bytes: Largest file (default: 4 GiB) unless one tensor is larger. As much is in memory.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: The checkpoint is damaged or the folder is not empty; nothing is left behind.
    """
    if is_sharded(str(checkpoint)):
        raise CheckpointError(f"{checkpoint} is a sharded model, not a checkpoint; use the model that it was made from")
    source, target = find_checkpoint(Path(checkpoint)), Path(folder)
    manifest = read_manifest(source)
    names = [name for name in manifest["files"] if name.startswith((f"{HF_FOLDER}/", f"{STUDENT_FOLDER}/"))]
    if not names:
        raise CheckpointError(f"{source} has no model to export")
    check_with_progress(source, manifest, names)
    with new_folder(target) as beside:
        for file in (source / HF_FOLDER).iterdir():
            if file.is_dir():  # of named chat templates
                shutil.copytree(file, beside / file.name)
            elif file.suffix != ".safetensors" and file.name != _INDEX:
                shutil.copy2(file, beside)
        config = json.loads((beside / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = config["dtype"] if dtype is None else str(DTYPES[dtype]).removeprefix("torch.")
        (beside / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        shards, exported = ShardReader(source / STUDENT_FOLDER), HFWeights(source / HF_FOLDER)

        def removed(name: str, count: int) -> torch.Tensor | None:
            return exported.read(name)[count:] if exported.shape(name)[0] > count else None

        names = progress_bar(list(shards.shard_specs), description="export", unit="tensor")
        weights = _standard_weights(
            shards, names, FAMILIES[config["model_type"]], getattr(torch, config["dtype"]), removed
        )
        write_safetensors(weights, beside, max_shard_bytes)
    return source


def check_export(folder: str | Path) -> None:
    """Loads an exported folder with transformers alone.

    Raises:
        CheckpointError: Weights are missing or left over.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    _, info = loaded
    wrong = {name: sorted(keys) for name, keys in info.items() if name != "error_msgs" and keys}
    if wrong:
        raise CheckpointError(f"{folder}: transformers reports {wrong}")
