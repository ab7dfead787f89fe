"""A partitioned model on disk that any layout can read.

    layout.json                 every parameter's whole shape and how it was sharded
    tp00_dp00.safetensors ...   what each rank held: runs of its tensor-parallel shards, flat, as ``KIND/NAME``

Kinds: ``master``, ``exp_avg``, ``exp_avg_sq`` of a trained model (float32), or ``weight`` alone. A rank of the same
layout finds exactly its runs; any other takes what overlaps, or joins shards and shards them again. Nothing in these
files is executed.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from megadistill.errors import CheckpointError, first_line
from megadistill.models.shard_spec import ShardSpec
from megadistill.models.tensor_file import save_tensors

LAYOUT = "layout.json"
MASTER, MOMENTS, WEIGHT = "master", ("exp_avg", "exp_avg_sq"), "weight"
VERSION = 1


def shard_file(tp_rank: int, dp_rank: int) -> str:
    """Name of a rank's file."""
    return f"tp{tp_rank:02d}_dp{dp_rank:02d}.safetensors"


def write_layout(folder: Path, specs: Mapping[str, ShardSpec], *, tp_size: int, dp_size: int, **more: Any) -> None:
    """Writes layout.json.

    Args:
        folder: Where it goes.
        specs: Name of each parameter -> how it is sharded.
        tp_size: Tensor-parallel size.
        dp_size: Data-parallel size.
        more: Further entries.
    """
    more |= {"tp_size": tp_size, "dp_size": dp_size}
    parameters = {name: asdict(spec) for name, spec in specs.items()}
    text = json.dumps({"version": VERSION, **more, "parameters": parameters}, indent=1)
    (folder / LAYOUT).write_text(text + "\n", encoding="utf-8")


def write_shard(folder: Path, file: str, runs: Mapping[str, tuple[int, torch.Tensor]]) -> dict[str, Any]:
    """Writes one rank's runs; returns the file's entry in a manifest.

    Args:
        folder: Where the file goes.
        file: Its name (``shard_file``).
        runs: ``KIND/NAME`` -> (first element in the tensor-parallel shard, flat tensor).
    """
    starts = json.dumps({key: start for key, (start, _) in runs.items()})
    return save_tensors({key: run for key, (_, run) in runs.items()}, folder / file, starts=starts)


class ShardReader:
    """Reads such a folder. Files are memory-mapped, so only what is asked for is read.

    Args:
        folder: The folder.

    Attributes:
        folder: The folder.
        info: Entries of layout.json, but for the parameters.
        shard_specs: Name of each parameter -> how the folder's layout shards it.

    Raises:
        CheckpointError: The folder cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        try:
            self.info: dict[str, Any] = json.loads((folder / LAYOUT).read_text(encoding="utf-8"))
            if self.info["version"] != VERSION:
                raise CheckpointError(
                    f"{folder / LAYOUT}: version {self.info['version']} is not supported (this program reads {VERSION})"
                )
            self.shard_specs = {name: _parse_spec(entry) for name, entry in self.info.pop("parameters").items()}
            self._runs: dict[tuple[int, str], list[tuple[int, int, Any]]] = {}
            # The files of the layout and no others, whatever lies beside them.
            for tp_rank, dp_rank in itertools.product(range(self.info["tp_size"]), range(self.info["dp_size"])):
                path = folder / shard_file(tp_rank, dp_rank)
                if not path.is_file():
                    continue
                file = safe_open(path, framework="pt")
                for key, start in json.loads(file.metadata()["starts"]).items():
                    numel = file.get_slice(key).get_shape()[0]
                    self._runs.setdefault((tp_rank, key), []).append((start, start + numel, file))
        except FileNotFoundError:
            raise CheckpointError(f"{folder} holds no sharded model: it has no {LAYOUT}") from None
        except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise CheckpointError(f"{folder} is damaged: {error!r}") from None
        for runs in self._runs.values():
            runs.sort(key=lambda run: run[:2])

    @property
    def kinds(self) -> set[str]:
        """Kinds of tensors that the files have."""
        return {key.partition("/")[0] for _, key in self._runs}

    def stream(self, names: Iterable[str]) -> Iterator[str]:
        """The names as they are: any order will do."""
        yield from names

    def read(self, kind: str, name: str, spec: ShardSpec, tp_rank: int, start: int, end: int) -> torch.Tensor:
        """A run of a parameter's shard, whatever the folder's layout.

        Args:
            kind: What of the parameter, one of ``kinds``.
            name: The parameter.
            spec: How it is sharded where the run is needed.
            tp_rank: The shard.
            start: First element of the run in the flat shard.
            end: One past the last element.

        Raises:
            CheckpointError: The folder does not have it.
        """
        ours = self.spec_of(name)
        if ours.shape != spec.shape:
            raise CheckpointError(f"{self.folder}: {name} has shape {list(ours.shape)}, expected {list(spec.shape)}")
        if (ours.dim, ours.sizes, ours.blocks) == (spec.dim, spec.sizes, spec.blocks):
            return self._run(kind, name, tp_rank if spec.dim is not None else 0, start, end)
        return spec.shard(self.whole(kind, name), tp_rank).reshape(-1)[start:end]

    def whole(self, kind: str, name: str) -> torch.Tensor:
        """A whole parameter.

        Args:
            kind: What of the parameter, one of ``kinds``.
            name: The parameter.

        Raises:
            CheckpointError: The folder does not have it.
        """
        spec = self.spec_of(name)
        shards = []
        for tp_rank in range(max(1, len(spec.sizes))):
            shape = spec.shard_shape(tp_rank)
            if numel := torch.Size(shape).numel():
                shards.append(self._run(kind, name, tp_rank, 0, numel).view(shape))
        return spec.unshard(shards)

    def spec_of(self, name: str) -> ShardSpec:
        """How the folder's layout shards a parameter.

        Raises:
            CheckpointError: The folder does not have it.
        """
        if name not in self.shard_specs:
            raise CheckpointError(f"{self.folder} has no parameter {name}: it belongs to another model")
        return self.shard_specs[name]

    def refuse_others(self, names: Iterable[str]) -> None:
        """Refuses parameters that a model does not have.

        Args:
            names: The model's parameters; ``read`` refuses those that the folder does not have.

        Raises:
            CheckpointError: The folder has others.
        """
        if others := self.shard_specs.keys() - set(names):
            raise CheckpointError(
                f"{self.folder} has {len(others)} parameters that the model of config.json does not have, "
                f"{min(others)} among them: one of the two is of another model"
            )

    def whole_file(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a file that lies beside those of the ranks.

        Raises:
            CheckpointError: It is missing or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self.folder / name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / name} is missing or damaged: {first_line(error)}") from None

    def _run(self, kind: str, name: str, tp_rank: int, start: int, end: int) -> torch.Tensor:
        key = f"{kind}/{name}"
        pieces: list[torch.Tensor] = []
        at = start
        for first, last, file in self._runs.get((tp_rank, key), []):
            if first <= at < last and at < end:
                pieces.append(file.get_slice(key)[at - first : min(last, end) - first])
                at = min(last, end)
        if at < end:
            raise CheckpointError(
                f"{self.folder}: elements {at} to {end} of {key} (tensor-parallel rank {tp_rank}) are missing"
            )
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class HFWeights:
    """The tensors of a Hugging Face folder by name, memory-mapped.

    Args:
        folder: A folder with safetensors files.

    Raises:
        CheckpointError: There are no such files, or one is damaged.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        except SafetensorError as error:
            raise CheckpointError(f"{folder} holds a damaged safetensors file: {error}") from None
        self._file = {name: file for file in files for name in file.keys()}  # noqa: SIM118  not a mapping
        if not self._file:
            raise CheckpointError(f"{folder} has no safetensors files")

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._file)

    def shape(self, name: str) -> list[int]:
        """Shape of a tensor."""
        return cast(list[int], self._file[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Type of a tensor in safetensors' words, such as "BF16"."""
        return cast(str, self._file[name].get_slice(name).get_dtype())

    def torch_dtype(self, name: str) -> torch.dtype:
        """Type of a tensor in torch's words; none of its numbers are read."""
        return cast(torch.Tensor, self._file[name].get_slice(name)[:0]).dtype

    def read(self, name: str) -> torch.Tensor:
        """A tensor."""
        return cast(torch.Tensor, self._file[name].get_tensor(name))


def _parse_spec(entry: Mapping[str, Any]) -> ShardSpec:
    blocks = entry["blocks"]
    spec = ShardSpec(
        tuple(map(int, entry["shape"])),
        entry["dim"],
        tuple(map(int, blocks)) if isinstance(blocks, list) else int(blocks),
        tuple(map(int, entry["sizes"])),
    )
    least = min(spec.blocks) if isinstance(spec.blocks, tuple) else spec.blocks
    if any(size < 0 for size in (*spec.shape, *spec.sizes)) or least < 1:
        raise ValueError(f"not a shape: {dict(entry)}")
    if spec.dim is not None and not (0 <= spec.dim < len(spec.shape) and sum(spec.sizes) == spec.shape[spec.dim]):
        raise ValueError(f"not the shards of the shape: {dict(entry)}")
    if isinstance(spec.blocks, tuple) and (spec.dim is None or sum(spec.blocks) != spec.shape[spec.dim]):
        raise ValueError(f"not the blocks of the shape: {dict(entry)}")
    return spec


def rewrite(
    reader: ShardReader, folder: Path, specs: Mapping[str, ShardSpec], tp_size: int, dp_size: int
) -> Iterator[str]:
    """Writes the shard files of another layout; one rank's share is held at a time.

    Args:
        reader: The model.
        folder: Where the files go.
        specs: Name of each parameter -> how it is sharded there.
        tp_size: Tensor-parallel size there.
        dp_size: Data-parallel size there.

    Yields:
        The name of each file when it is written.

    Raises:
        CheckpointError: A parameter cannot be read.
    """
    for tp_rank in range(tp_size):
        for dp_rank in range(dp_size):
            runs: dict[str, tuple[int, torch.Tensor]] = {}
            for name, spec in specs.items():
                if spec.dim is None and tp_rank:
                    continue  # the first rank's is everybody's
                numel = torch.Size(spec.shard_shape(tp_rank)).numel()
                width = -(-numel // dp_size)
                start, end = min(numel, dp_rank * width), min(numel, (dp_rank + 1) * width)
                if start < end:
                    for kind in sorted(reader.kinds):
                        run = reader.read(kind, name, spec, tp_rank, start, end)
                        runs[f"{kind}/{name}"] = (start, run.clone())
            write_shard(folder, shard_file(tp_rank, dp_rank), runs)
            yield shard_file(tp_rank, dp_rank)
