"""Checkpoints and models for another layout, written by one process.

A run reads files of any layout; those of its own layout are faster, because each rank reads only its part. How AutoTP
would shard the parameters comes from the family's entry in models/families.py; if it ever shards otherwise, reading is
slower, and still right.
"""

from __future__ import annotations

import gc
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megadistill.checkpoint.adapter_export import has_adapters
from megadistill.checkpoint.carried import carried_files
from megadistill.checkpoint.hf_files import set_tied
from megadistill.checkpoint.manifest import (
    HF_FOLDER,
    STUDENT_FOLDER,
    check_with_progress,
    digest,
    files_below,
    find_checkpoint,
    new_folder,
    read_manifest,
    write_manifest,
)
from megadistill.checkpoint.probe import check_same_logits, probe_logits, streamed_logits
from megadistill.data.tokenize import load_tokenizer, vocabulary_size
from megadistill.errors import ConfigError, TopologyError
from megadistill.models.end_tokens import end_tokens
from megadistill.models.families import Family, family_of, has_own_head, head_counts
from megadistill.models.folder_checks import SHARDS, check_weights
from megadistill.models.loading import DTYPES, REMOVED_ROWS, load_model, load_model_config
from megadistill.models.shard_spec import ShardSpec
from megadistill.models.shards import ShardReader, rewrite, write_layout
from megadistill.models.tensor_file import save_tensors
from megadistill.models.weights import load_weights
from megadistill.observability.progress import progress_bar
from megadistill.parallel.topology import divisors


def reshard_checkpoint(checkpoint: str | Path, folder: str | Path, *, tp_size: int, dp_size: int) -> Path:
    """Writes a checkpoint as a run of tp_size x dp_size processes with ZeRO-3 would have written it.

    One rank's part is in memory at a time.

    Args:
        checkpoint: A checkpoint, or a run directory: its latest one. Its files are checked first.
        folder: Must not exist, or be empty.
        tp_size: Tensor-parallel processes.
        dp_size: Data-parallel processes.

    Returns:
        The checkpoint that was read.

    Raises:
        CheckpointError: The checkpoint is damaged or the folder is not empty; nothing is left behind.
        TopologyError: ``tp_size`` does not divide the heads.
    """
    source = find_checkpoint(Path(checkpoint))
    manifest = read_manifest(source)
    check_with_progress(source, manifest, manifest["files"])
    config = load_model_config(str(source / HF_FOLDER), str(source))
    _check_tp_size(tp_size, config, str(source))
    reader = ShardReader(source / STUDENT_FOLDER)
    specs = family_shards(
        {name: spec.shape for name, spec in reader.shard_specs.items()},
        family_of(config, str(source)),
        tp_size,
    )
    layout = {**manifest["layout"], "tp_size": tp_size, "dp_size": dp_size, "zero_stage": 3}
    with new_folder(Path(folder)) as beside:
        for item in source.iterdir():
            if item.is_dir() and item.name != STUDENT_FOLDER:
                shutil.copytree(item, beside / item.name)
            elif item.is_file():
                shutil.copy2(item, beside)
        if not has_adapters(source):
            set_tied(beside / HF_FOLDER, reader.shard_specs)
        _write_shards(reader, beside / STUDENT_FOLDER, specs, tp_size, dp_size, {**reader.info, **layout})
        files = progress_bar(files_below(beside), description="checksums", unit="file")
        write_manifest(beside, manifest["step"], layout, {name: digest(beside / name, sync=True) for name in files})
    return source


def shard_model(
    path: str, folder: str | Path, *, tp_size: int, dp_size: int, dtype: str | None = None, tokenizer: str | None = None
) -> None:
    """Writes a Hugging Face model as a folder with one file per rank, which a run takes in place of the model.

    Vocabulary rows beyond the tokenizer's are kept separately, because a run does not train them.

    Args:
        path: Model folder or hub name.
        folder: Must not exist, or be empty.
        tp_size: Tensor-parallel processes.
        dp_size: Data-parallel processes.
        dtype: fp32 or bf16; default: the model's own (fp32 for float16).
        tokenizer: Folder or hub name; default: the model's.

    Raises:
        CheckpointError: What was written is another model on the probe text; nothing is left behind.
        ConfigError: The model or tokenizer cannot be used; nothing is left behind.
        TopologyError: ``tp_size`` does not divide the heads.
    """
    config = load_model_config(path, "MODEL")
    _check_tp_size(tp_size, config, f"MODEL {path}")
    check_weights(path, "MODEL")
    words = load_tokenizer(tokenizer or path)
    size = vocabulary_size(words)
    if config.vocab_size < size:
        raise ConfigError(f"MODEL: {path} has {config.vocab_size} vocabulary rows, the tokenizer needs {size}")
    carried = carried_files(path, tokenizer or path, words, end_tokens(path, words, vocab_size=size), config)
    with new_folder(Path(folder)) as beside:
        expected, own = _source_logits(path, size)
        dtype = dtype or ("bf16" if own is torch.bfloat16 else "fp32")
        _write_model(path, beside, tp_size, dp_size, dtype, size)
        carried.write(beside)
        gc.collect()
        written = load_model(str(beside), dtype=dtype, vocab_size=size, seed=0, attention="sdpa", where=str(folder))
        check_same_logits(expected, streamed_logits(written, size), path, own, DTYPES[dtype])


def _source_logits(path: str, vocab_size: int) -> tuple[torch.Tensor, torch.dtype]:
    """Logits of the model that is sharded, by transformers alone, and its type, in which the files stay mapped."""
    model = load_weights(path, "MODEL", rank=1, dtype="auto")  # rank 1 says nothing: _write_model opens it again
    return probe_logits(model.eval(), vocab_size), model.dtype


def _write_model(path: str, folder: Path, tp_size: int, dp_size: int, dtype: str, vocab_size: int) -> None:
    """Weights and configuration of ``shard_model``'s folder; one rank's share is in memory at a time."""
    loaded = load_model(path, dtype=dtype, vocab_size=vocab_size, seed=0, attention="eager", where="MODEL")
    specs = family_shards(loaded.shapes, loaded.family, tp_size)
    info = {"tp_size": tp_size, "dp_size": dp_size, "model": loaded.fingerprint}
    _write_shards(loaded.weights, folder / SHARDS, specs, tp_size, dp_size, info)
    removed = {name: rows.contiguous() for name, rows in loaded.removed_rows.items()}
    save_tensors(removed, folder / SHARDS / REMOVED_ROWS)
    loaded.config.save_pretrained(folder)


def family_shards(shapes: Mapping[str, tuple[int, ...]], family: Family, tp_size: int) -> dict[str, ShardSpec]:
    """How AutoTP shards the parameters of a family."""
    is_tied = not has_own_head(shapes)
    return {
        name: ShardSpec.even(shape, family.shard_dim(name, is_tied=is_tied), family.blocks(name), tp_size)
        for name, shape in shapes.items()
    }


def _check_tp_size(tp_size: int, config: Any, where: str) -> None:
    heads = head_counts(config, where)
    allowed = divisors(math.gcd(*heads.values()))
    if tp_size not in allowed:
        undivided = ", ".join(f"the {count} {what}" for what, count in heads.items() if count % tp_size)
        raise TopologyError(
            f"a tensor-parallel size of {tp_size} does not divide {undivided}; allowed: {', '.join(map(str, allowed))}",
            setting="parallel.tp_size",
        )


def _write_shards(
    reader: Any, folder: Path, specs: Mapping[str, ShardSpec], tp_size: int, dp_size: int, info: Mapping[str, Any]
) -> None:
    folder.mkdir(parents=True)
    grid = {"tp_size": tp_size, "dp_size": dp_size}
    write_layout(folder, specs, **{key: value for key, value in info.items() if key != "version"} | grid)
    files = rewrite(reader, folder, specs, tp_size, dp_size)
    for _ in progress_bar(files, description="write", total=tp_size * dp_size, unit="file"):
        pass
