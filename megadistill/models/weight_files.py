"""The files of a model's weights: found or downloaded, opened, and read by name, of each tensor only what is asked for.

safetensors and torch's own files (``pytorch_model.bin``), one file or several with an index.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from zipfile import is_zipfile

import torch

from megadistill.data.hub import split_revision
from megadistill.errors import ConfigError, first_line
from megadistill.models.folder_checks import has_weights, is_sharded

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
_NAMES = (SAFETENSORS, SAFETENSORS_INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
ReadMode = Literal["map", "copy"]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file, of which no number has been read.

    Attributes:
        key: Its name in the file.
        shape: Its shape.
        dtype: Its type.
        content: Indexing it with slices reads.
        place: Number of the file and of the tensor in the file: the order in which a disk reads fastest.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    content: Any
    place: tuple[int, int] = (0, 0)

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def weight_files(path: str, where: str, named: str | None = None) -> list[Path]:
    """The files with a model's weights, of a hub name downloaded.

    Args:
        path: A model folder or a hub name.
        where: The key or option that names the model; errors begin with it.
        named: The one file or index that the configuration names (``transformers_weights``), if any.

    Raises:
        ConfigError: There are none, or one that an index names is missing; a hub name cannot be had.
    """
    if not isinstance(named, str | None):
        raise ConfigError(f"{where}: in the config.json of '{path}', transformers_weights={named} is no file's name")
    names = _NAMES if named is None else (named,)
    folder = Path(path)
    if not folder.is_dir():
        return _downloaded(path, names, where)
    found = next((name for name in names if _is_inside(name) and (folder / name).is_file()), None)
    if found is None:
        raise ConfigError(f"{where}: '{path}' has no weights: none of {', '.join(names)} is there")
    if not found.endswith(".index.json"):
        return [folder / found]
    try:
        listed = json.loads((folder / found).read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / name for name in sorted(set(listed))]
        if not all(map(_is_inside, listed)):
            raise ValueError("it names files outside of the folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where}: {folder / found} is damaged: {first_line(error)}") from None
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        absent = f", {missing[0].name} among them" if missing else ""
        raise ConfigError(
            f"{where}: {folder / found} names {len(files)} files, of which {len(missing)} are missing{absent}: was a "
            "download or a copy interrupted?"
        )
    return files


def check_weight_files(path: str, where: str, named: str | None = None) -> None:
    """``weight_files`` for errors alone, of a local folder that holds a model as the hub has it; nothing is opened."""
    if Path(path).is_dir() and has_weights(path) and not is_sharded(path):
        weight_files(path, where, named)


def _is_inside(name: str) -> bool:
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _downloaded(name: str, names: Sequence[str], where: str) -> list[Path]:
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    repository, revision = split_revision(name)
    options: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    try:
        candidates = (cached_file(repository, each, **options) for each in names)
        found = next((file for file in candidates if file is not None), None)
        if found is not None and found.endswith(".index.json"):
            return [Path(file) for file in get_checkpoint_shard_files(repository, found, revision=revision)[0]]
    except Exception as error:  # of the network, the disk, or the hub: many types for one cause
        raise ConfigError(f"{where}: cannot download the weights of '{name}': {first_line(error)}") from error
    if found is None:
        raise ConfigError(f"{where}: '{name}' has no weights: none of {', '.join(names)} is there")
    return [Path(found)]


def open_tensors(files: Sequence[Path], path: str, where: str, read: ReadMode = "map") -> dict[str, StoredTensor]:
    """All tensors of some files by name, in the order of the files. Only headers are read.

    Args:
        files: From ``weight_files``.
        path: The model, for errors.
        where: The key or option that names the model; errors begin with it.
        read: Whether safetensors files are mapped into memory or read by system calls.

    Raises:
        ConfigError: A file is damaged or truncated, holds integers, or a tensor that another one holds too.
    """
    tensors: dict[str, StoredTensor] = {}
    for number, file in enumerate(files):
        try:
            opened = _torch_tensors(file) if file.suffix == ".bin" else _safe_tensors(file, read)
            found = {
                key: StoredTensor(key, tuple(shape), dtype, content, (number, i))
                for i, (key, shape, dtype, content) in enumerate(opened)
            }
        except Exception as error:  # of safetensors, torch, pickle, zip: many types for one cause
            reason = f"{file.name}: {first_line(error)}"
            raise ConfigError(f"{where}: cannot load the weights in '{path}': {reason}") from error
        twice = next((key for key in found if key in tensors), None)
        if twice is not None:
            other = files[tensors[twice].place[0]].name
            raise ConfigError(
                f"{where}: cannot load the weights in '{path}': {twice} is in {other} and in {file.name}, and only one "
                "can be meant; were files of two checkpoints mixed?"
            )
        tensors |= found
    return tensors


def _safe_tensors(file: Path, read: ReadMode) -> Iterator[tuple[str, Sequence[int], torch.dtype, Any]]:
    from safetensors import safe_open

    opened = safe_open(file, framework="pt", backend="mmap" if read == "map" else "pread")
    for key in opened.offset_keys():
        content = opened.get_slice(key)
        shape = content.get_shape()
        if shape:
            yield key, shape, content[:0].dtype, content
        else:
            yield key, shape, opened.get_tensor(key).dtype, None


def _torch_tensors(file: Path) -> Iterator[tuple[str, Sequence[int], torch.dtype, Any]]:
    # Files of torch before 1.6 are no archives and cannot be mapped.
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    for key, tensor in content.items():
        if isinstance(tensor, torch.Tensor):
            yield key, tensor.shape, tensor.dtype, tensor
