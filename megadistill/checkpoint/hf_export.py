"""A partitioned student as a Hugging Face folder, with standard names, shapes and layout, which any tool can load."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

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
from megadistill.checkpoint.probe import check_same_logits, folder_logits, probe_logits
from megadistill.errors import CheckpointError
from megadistill.models.families import FAMILIES, Family, has_own_head
from megadistill.models.folder_checks import is_sharded
from megadistill.models.loading import DTYPES, LoadedModel, load_model_config, model_from_shards
from megadistill.models.shards import MASTER, HFWeights, ShardReader, save_tensors
from megadistill.observability.progress import progress_bar

if TYPE_CHECKING:  # the second loads DeepSpeed, which none of the tools needs
    from transformers import PreTrainedConfig

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
    _check_tensors(folder, loaded, dtype)
    _write_configuration(loaded, student, folder, carried)
    carried.write(folder)


def _check_tensors(folder: Path, loaded: LoadedModel, dtype: torch.dtype) -> None:
    """Compares names, shapes and types in the written files with the model as it was loaded.

    Raises:
        CheckpointError: A tensor is missing, left over, or of another shape or type.
    """
    removed = loaded.removed_rows
    expected: dict[str, tuple[list[int], torch.dtype]] = {}
    for name, shape in loaded.shapes.items():
        whole = torch.empty(shape, device="meta")
        rows, *rest = loaded.family.export(name, whole).shape
        expected[name] = ([rows + (len(removed[name]) if name in removed else 0), *rest], dtype)
    written = HFWeights(folder)
    found = {name: (written.shape(name), written.torch_dtype(name)) for name in written.names}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(f"{folder}: {name} is {found.get(name)}, expected {expected.get(name)}")


def prove_student(shards: ShardReader, config: PreTrainedConfig, folder: Path, source: object) -> None:
    """Compares what plain transformers makes of an exported folder with the student's own weights, on a probe text.

    One of the two models is in memory at a time, in the folder's type. Not while another thread makes tensors:
    transformers changes torch's default type for the process while it loads.

    Args:
        shards: The student as it was saved.
        config: Its configuration.
        folder: The exported folder.
        source: The student, for the message.

    Raises:
        CheckpointError: The folder is another model, or cannot be loaded.
    """
    from transformers import AutoConfig

    dtype = AutoConfig.from_pretrained(folder).dtype
    own = model_from_shards(config, shards, MASTER, dtype)
    vocab_size = int(cast(Any, own.get_output_embeddings()).weight.shape[0])
    expected = probe_logits(own, vocab_size)
    del own
    check_same_logits(expected, folder_logits(folder, vocab_size), source, dtype)


def set_tied(folder: Path, names: Collection[str]) -> None:
    """Makes ``tie_word_embeddings`` in a folder's config.json true to its weights.

    Other tools tie by this setting even where there is a head.

    Args:
        folder: The folder.
        names: Names of the model's parameters.
    """
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {"tie_word_embeddings": not has_own_head(names)}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
        _check_read_back(current, files[-1])
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


def _check_read_back(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Raises CheckpointError where a file does not hold, bit for bit, what was written to it."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as written:
        for name, tensor in tensors.items():
            # As bytes: NaN is not equal to itself.
            if not torch.equal(_bytes(written.get_tensor(name)), _bytes(tensor)):
                raise CheckpointError(f"{file} does not hold what was written to it ({name}): is the disk sound?")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


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
        tensor = family.export(name, shards.whole(MASTER, name))
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
        CheckpointError: The checkpoint is damaged, the folder is not empty, or what was written is another model on the
            probe text; nothing is left behind.
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
        set_tied(beside, shards.shard_specs)
        prove_student(shards, load_model_config(str(source / HF_FOLDER), str(source)), beside, source)
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
