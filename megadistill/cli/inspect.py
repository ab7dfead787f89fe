"""``megadistill inspect PATH``: what a checkpoint or model contains."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from megadistill.cli.parsing import Parser
from megadistill.errors import CheckpointError, ConfigError
from megadistill.files import reason_of


def run(arguments: Sequence[str]) -> int:
    """Runs the verb; returns its exit code."""
    parser = Parser(
        "inspect",
        "Describes a checkpoint, a run's latest one, a Hugging Face folder or a sharded model.\n"
        "It reads headers only, and executes nothing.",
        "examples:\n  megadistill inspect runs/demo --check\n  megadistill inspect exported/student --tensors",
    )
    parser.add_argument("path", metavar="PATH", help="run directory, step_N folder, model folder")
    parser.add_argument("--check", action="store_true", help="compare every file of a checkpoint with its checksum")
    parser.add_argument("--tensors", action="store_true", help="one line per tensor: shape, and type or shards")
    parsed = parser.parse(arguments)
    path = Path(parsed.path)

    from megadistill.models.folder_checks import SHARDS

    is_model = (path / SHARDS).is_dir() or (path / "config.json").is_file()
    if parsed.check and is_model:
        raise ConfigError(f"{path} is not a checkpoint: it has no checksums for --check to compare")
    if (path / SHARDS).is_dir():
        _print(_sharded(path / SHARDS, parsed.tensors))
    elif (path / "config.json").is_file():
        _print(_model(path, parsed.tensors))
    else:
        _print(_checkpoint(path, parsed.tensors))
        if parsed.check:
            _check(path)
    return 0


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def _checkpoint(path: Path, with_tensors: bool) -> Iterable[str]:
    from megadistill.checkpoint.manifest import (
        HF_FOLDER,
        STUDENT_FOLDER,
        checkpoints_of,
        find_checkpoint,
        read_manifest,
    )

    folder = find_checkpoint(path)
    manifest = read_manifest(folder)
    layout, files = manifest["layout"], manifest["files"]
    yield f"checkpoint  {folder}"
    if others := [other.name for other in checkpoints_of(path) if other != folder]:
        yield f"others      {', '.join(others)}"
    yield f"step        {manifest['step']}"
    yield f"saved by    tp {layout['tp_size']} x dp {layout['dp_size']}, ZeRO-{layout['zero_stage']}"
    yield f"model       {layout['model']}; gate with {layout['gate']} parameters"
    yield f"files       {len(files)}, {_bytes(sum(entry['bytes'] for entry in files.values()))}"
    yield from _sharded(folder / STUDENT_FOLDER, with_tensors)
    yield from _model(folder / HF_FOLDER, False)


def _sharded(folder: Path, with_tensors: bool) -> Iterable[str]:
    from megadistill.models.shards import WEIGHT, ShardReader

    reader = ShardReader(folder)
    specs = reader.shard_specs
    numel = sum(math.prod(spec.shape) for spec in specs.values())
    kinds = ", ".join(sorted(reader.kinds))
    grid = f"tp {reader.info['tp_size']} x dp {reader.info['dp_size']}"
    yield f"shards      {folder}: {grid}; {len(specs)} parameters, {numel:,} numbers each of {kinds}"
    if WEIGHT in reader.kinds:
        name = next(iter(specs))
        yield f"model       {reader.info['model']}, {str(reader.whole(WEIGHT, name).dtype).removeprefix('torch.')}"
    if "optimizer_steps" in reader.info:
        yield f"optimizer   {reader.info['optimizer_steps']} updates"
    if with_tensors:
        for name, spec in specs.items():
            sizes = " + ".join(map(str, spec.sizes))
            how = "whole" if spec.dim is None else f"dimension {spec.dim} sharded into {sizes}"
            yield f"  {name}  {list(spec.shape)}  {how}"


def _model(folder: Path, with_tensors: bool) -> Iterable[str]:
    from megadistill.models.adapter_files import AdapterFolder
    from megadistill.models.folder_checks import quantization_of
    from megadistill.models.shards import HFWeights

    try:
        config = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        weights = HFWeights(folder)
    except (OSError, ValueError, TypeError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else error
        raise CheckpointError(f"{folder} cannot be read: {reason}") from None
    types = Counter(weights.dtype(name) for name in weights.names)
    numel = sum(math.prod(weights.shape(name)) for name in weights.names)
    yield f"model       {folder}: {config.get('model_type')}, {len(weights.names)} tensors, {numel:,} parameters"
    if (adapters := AdapterFolder.of(str(folder), str(folder), is_checked=False)) is not None:
        yield f"adapters    multiplied by {adapters.config.scale:g}, of the base {adapters.base}"
    if (method := quantization_of(config)) is not None:
        yield f"quantized   {method}: no verb but this one reads it; use the model that it was made from"
    yield f"types       {', '.join(f'{kind} {count}' for kind, count in types.items())}"
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    yield f"tokenizer   {'yes' if has_tokenizer else 'none'}; vocabulary of {config.get('vocab_size')} rows"
    if with_tensors:
        yield from (f"  {name}  {weights.shape(name)}  {weights.dtype(name)}" for name in weights.names)


def _check(path: Path) -> None:
    from megadistill.checkpoint.manifest import check_with_progress, files_below, find_checkpoint, read_manifest

    folder = find_checkpoint(path)
    manifest = read_manifest(folder)
    check_with_progress(folder, manifest, manifest["files"])
    if more := sorted(set(files_below(folder)) - set(manifest["files"])):
        print(f"other files {len(more)} that do not belong to the checkpoint and are not read: {', '.join(more)}")
    print("complete    every file is as it was written")


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
