"""A partitioned student as a Hugging Face folder, with standard names, shapes and layout, which any tool can load."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from megadistill.checkpoint.adapter_export import export_adapters, export_merged, has_adapters
from megadistill.checkpoint.carried import Carried
from megadistill.checkpoint.hf_files import copy_beside, set_tied, write_index, write_safetensors
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
from megadistill.models.adapter_files import write_adapter_settings
from megadistill.models.families import FAMILIES, Family
from megadistill.models.folder_checks import is_sharded
from megadistill.models.loading import DTYPES, LoadedModel, load_model_config, model_from_shards
from megadistill.models.shards import MASTER, HFWeights, ShardReader
from megadistill.models.tensor_file import Entry
from megadistill.observability.progress import progress_bar

if TYPE_CHECKING:  # the second loads DeepSpeed, which none of the tools needs
    from transformers import PreTrainedConfig

    from megadistill.engines.partitioned import PartitionedModel


def complete_student(
    student: PartitionedModel, entries: Mapping[str, Sequence[Entry]], folder: Path, carried: Carried
) -> None:
    """Adds to the files of weights what makes a model folder of them: index, configurations, and the files beside them.

    Args:
        student: The student.
        entries: Name of each file -> the tensors that it should hold.
        folder: Where they are.
        carried: What goes beside them.

    Raises:
        CheckpointError: By the files' headers, a tensor is missing, left over, or of another shape or type.
    """
    write_index(folder, entries)
    _check_headers(folder, entries)
    _write_configuration(student.loaded, student, folder, carried)
    if student.loaded.lora is not None:
        write_adapter_settings(student.loaded.lora, student.loaded.family, folder)
    carried.write(folder)


def _check_headers(folder: Path, entries: Mapping[str, Sequence[Entry]]) -> None:
    expected = {entry.name: entry for held in entries.values() for entry in held}
    written = HFWeights(folder)
    found = {name: Entry(name, tuple(written.shape(name)), written.torch_dtype(name)) for name in written.names}
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
        yield family.stored_name(name), (tensor if rows is None else torch.cat([tensor, rows.to(tensor)])).to(dtype)


def _write_configuration(loaded: LoadedModel, student: PartitionedModel, folder: Path, carried: Carried) -> None:
    config = copy.deepcopy(loaded.config)
    config.architectures = [type(student.module).__name__]
    config.dtype = next(student.module.parameters()).dtype
    for name, value in carried.special_ids.items():
        setattr(config, name, value)
    config.save_pretrained(folder)


def export_checkpoint(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    is_merged: bool = False,
) -> Path:
    """Writes the student of a checkpoint to a folder, checked against the manifest. One process, no GPU.

    Args:
        checkpoint: A checkpoint, or a run directory: its latest one.
        folder: Must not exist, or be empty.
        dtype: The weights come from the optimizer's float32 ones: fp32 keeps them, bf16 rounds them once; default: as
            they were trained.
        max_shard_bytes: Largest file (default: 4 GiB) unless one tensor is larger. As much is in memory.
        is_merged: Of a checkpoint of adapters, write the whole model with them; else they are written alone.

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
    if is_merged and not has_adapters(source):
        raise CheckpointError(f"--merged: {source} has no adapters; it is exported whole without it")
    if max_shard_bytes is not None and has_adapters(source) and not is_merged:
        raise CheckpointError("--max-shard-size: adapters are one file; with --merged the whole model is exported")
    check_with_progress(source, manifest, names)
    with new_folder(target) as beside:
        if not has_adapters(source):
            _export_whole(source, beside, dtype, max_shard_bytes)
        elif is_merged:
            export_merged(source, beside, dtype=dtype, max_shard_bytes=max_shard_bytes)
        else:
            export_adapters(source, beside, dtype=dtype)
    return source


def _export_whole(source: Path, folder: Path, dtype: str | None, max_shard_bytes: int | None) -> None:
    copy_beside(source / HF_FOLDER, folder, dtype=None if dtype is None else DTYPES[dtype])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shards, exported = ShardReader(source / STUDENT_FOLDER), HFWeights(source / HF_FOLDER)

    family = FAMILIES[config["model_type"]]

    def removed(name: str, count: int) -> torch.Tensor | None:
        name = family.stored_name(name)
        return exported.read(name)[count:] if exported.shape(name)[0] > count else None

    names = progress_bar(list(shards.shard_specs), description="export", unit="tensor")
    weights = _standard_weights(shards, names, family, getattr(torch, config["dtype"]), removed)
    write_safetensors(weights, folder, max_shard_bytes)
    set_tied(folder, shards.shard_specs)
    prove_student(shards, load_model_config(str(source / HF_FOLDER), str(source)), folder, source)


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
