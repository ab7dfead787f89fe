"""The weights of a Hugging Face folder: which file holds which tensor, who writes it, and the index of files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megadistill.errors import CheckpointError
from megadistill.models.families import has_own_head
from megadistill.models.model_files import CONFIG
from megadistill.models.tensor_file import Entry, as_bytes, save_tensors

INDEX = "model.safetensors.index.json"
_MAX_FILE_BYTES = 4 << 30
_MIN_SHARE_BYTES = 128 << 20  # of a rank: writing less than that takes a moment


@dataclass(frozen=True)
class HFFile:
    """One file of weights.

    Attributes:
        name: Its name in the folder.
        rank: The rank that writes it.
        entries: Its tensors, in order.
    """

    name: str
    rank: int
    entries: tuple[Entry, ...]


def plan_files(entries: Sequence[Entry], num_ranks: int) -> list[HFFile]:
    """Shares tensors among ranks: consecutive ones of about as many bytes each, in files of at most 4 GiB.

    Small models have one file, and middle-sized ones fewer writers than there are ranks, which are spread over the
    nodes.

    Args:
        entries: All tensors, in order.
        num_ranks: Number of ranks.
    """
    total = sum(entry.bytes for entry in entries)
    num_writers = min(num_ranks, max(1, total // _MIN_SHARE_BYTES))
    files: list[tuple[int, list[Entry]]] = []
    begin, size = 0, 0
    for entry in entries:
        writer = (2 * begin + entry.bytes) * num_writers // max(1, 2 * total)  # by the middle of the tensor
        if not files or files[-1][0] != writer or size + entry.bytes > _MAX_FILE_BYTES:
            files.append((writer, []))
            size = 0
        files[-1][1].append(entry)
        begin, size = begin + entry.bytes, size + entry.bytes
    named = zip(file_names(len(files)), files, strict=True)
    return [HFFile(name, writer * num_ranks // num_writers, tuple(held)) for name, (writer, held) in named]


def file_names(count: int) -> list[str]:
    """The names that transformers gives ``count`` files of weights."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def write_index(folder: Path, files: Mapping[str, Sequence[Entry]]) -> None:
    """Writes the index of several files; one file needs none.

    Args:
        folder: Their folder.
        files: Name of each file -> its tensors.
    """
    if len(files) == 1:
        return
    total = sum(entry.bytes for entries in files.values() for entry in entries)
    weight_map = {entry.name: name for name, entries in files.items() for entry in entries}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_safetensors(
    tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, max_file_bytes: int | None = None
) -> None:
    """Writes ``model.safetensors``, or numbered files with an index where it would exceed ``max_file_bytes`` (4 GiB).

    Only the tensors of one file are in memory (``huggingface_hub`` would need all of them at once). Every file is read
    back and compared: no manifest tells later what it should hold.

    Raises:
        CheckpointError: A file does not hold what was written to it.
    """
    limit = max_file_bytes or _MAX_FILE_BYTES
    files: list[list[Entry]] = []
    current: dict[str, torch.Tensor] = {}
    size = 0

    def partial(number: int) -> Path:
        return folder / f"shard-{number}.partial"

    def flush() -> None:
        file = partial(len(files))
        files.append([Entry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in current.items()])
        save_tensors(current, file)
        _check_read_back(current, file)
        current.clear()

    for name, tensor in tensors:
        bytes_ = tensor.numel() * tensor.element_size()
        if current and size + bytes_ > limit:
            flush()
            size = 0
        current[name] = tensor
        size += bytes_
    flush()
    names = file_names(len(files))
    for number, name in enumerate(names):
        partial(number).replace(folder / name)
    write_index(folder, dict(zip(names, files, strict=True)))


def _check_read_back(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Raises CheckpointError where a file does not hold, bit for bit, what was written to it."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as written:
        for name, tensor in tensors.items():
            # As bytes: NaN is not equal to itself.
            if not torch.equal(as_bytes(written.get_tensor(name)), as_bytes(tensor)):
                raise CheckpointError(f"{file} does not hold what was written to it ({name}): is the disk sound?")


def set_tied(folder: Path, names: Collection[str]) -> None:
    """Makes ``tie_word_embeddings`` in a folder's config.json true to its weights.

    Other tools tie by this setting even where there is a head.

    Args:
        folder: The folder.
        names: Names of the model's parameters.
    """
    _change_config(folder, tie_word_embeddings=not has_own_head(names))


def copy_beside(folder: Path, to: Path, *, dtype: torch.dtype | None, leaves: Collection[str] = ()) -> None:
    """Copies what lies beside the weights of a Hugging Face folder; config.json names the type that is written.

    Args:
        folder: The folder.
        to: Exists.
        dtype: The type; None: as it is.
        leaves: Names of files that stay behind.
    """
    for file in folder.iterdir():
        if file.is_dir():  # of named chat templates
            shutil.copytree(file, to / file.name)
        elif file.suffix != ".safetensors" and file.name not in (INDEX, *leaves):
            shutil.copy2(file, to)
    if dtype is not None:
        _change_config(to, dtype=str(dtype).removeprefix("torch."))


def _change_config(folder: Path, **changes: Any) -> None:
    file = folder / CONFIG
    config = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
