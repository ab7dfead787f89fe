"""Models from a folder, a hub name, or a configuration alone (random weights), ready to be cut.

Weights stay memory-mapped where the file's type is the run's type, so the ranks of a node share one copy of the file
and each only copies the slice that tensor parallelism leaves it.
"""

from __future__ import annotations

import copy
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megadistill.data.hub import check_name
from megadistill.errors import ConfigError, first_line
from megadistill.files import did_you_mean_path
from megadistill.launch.launchers import rank_of
from megadistill.models.families import Family, family_of
from megadistill.models.shard_spec import ShardSpec
from megadistill.models.shards import WEIGHT, ShardReader
from megadistill.observability.log import get_logger

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_DROPOUTS = [
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "hidden_dropout",
    "attn_pdrop",
    "resid_pdrop",
    "embd_pdrop",
    "layerdrop",
    "summary_first_dropout",
]
SHARDS = "shards"  # folder of a model that tools/shard_model.py made
REMOVED_ROWS = "removed_rows.safetensors"
_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json")


@dataclass(frozen=True)
class LoadedModel:
    """A model on the CPU before it is cut.

    ``config`` is the untouched configuration, for exports. ``removed_rows`` maps parameter names to the padded
    vocabulary rows [full - V, ...] that were cut off, so that an export has the shapes it was loaded
    with. ``shapes`` are those of all parameters, ``fingerprint`` stands for them. ``shards``: the folder of
    per-rank files (docs/checkpoints.md) that the weights are still to be filled from, after the model is cut.
    """

    model: nn.Module
    family: Family
    config: Any
    removed_rows: dict[str, torch.Tensor]
    shapes: dict[str, tuple[int, ...]]
    fingerprint: str
    shards: Path | None = None


def load_model_config(path: str, where: str) -> Any:
    """The transformers configuration of a folder, a configuration file (.json) or a hub name.

    Raises ConfigError (naming ``where``, the configuration key) when there is none.
    """
    from transformers import AutoConfig

    local = Path(path)
    check_name(path, where)
    if local.is_dir() and not (local / "config.json").exists():
        raise ConfigError(f"{where}: {path} has no config.json; a model folder or a configuration file is needed")
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:  # transformers raises many kinds for one cause: this name leads to no configuration
        hint = "" if local.exists() else did_you_mean_path(path)
        reason = f"{first_line(error)}{hint}"
        raise ConfigError(f"{where}: cannot read a model configuration from '{path}': {reason}") from error
    family_of(config, where)
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "longrope":
        # transformers chooses its frequencies by the longest row of a batch: a row would depend on its neighbours.
        raise ConfigError(f"{where}: '{path}' has rotary positions of type longrope, which are not supported")
    return config


def check_positions(config: Any, max_tokens: int, what: str, where: str) -> None:
    """Raises ConfigError when a model reads fewer positions than ``max_tokens``; ``what`` says which setting asks for
    them."""
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and max_tokens > longest:
        raise ConfigError(f"{what}={max_tokens}, but {where} reads at most {longest} positions")


def has_weights(path: str) -> bool:
    """False for a configuration alone: a .json file, or a local folder without weight files."""
    local = Path(path)
    return not local.is_file() and (not local.is_dir() or any(True for p in _WEIGHT_FILES for _ in local.glob(p)))


def is_sharded(path: str) -> bool:
    """Whether a model folder is one that `megadistill shard` made: load_model reads it, transformers does not."""
    return (Path(path) / SHARDS).is_dir()


def load_weights(path: str, where: str, **options: Any) -> Any:
    """A causal language model of transformers with its weights; ``options`` are those of its ``from_pretrained``.

    Raises ConfigError where they cannot be read or some are missing.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    except Exception as error:
        raise ConfigError(f"{where}: cannot load the weights in '{path}': {first_line(error)}") from error
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise ConfigError(f"{where}: '{path}' lacks {len(names)} weights of its model, {names[0]} among them")
    return model


def load_model(path: str, *, dtype: str, vocab_size: int, seed: int, attention: str, where: str) -> LoadedModel:
    """Loads (or, from a configuration alone, randomly makes) a causal language model with dropout off.

    The head (and a tied embedding) is cut to the first ``vocab_size`` rows. ``seed`` determines random weights, which
    are therefore the same on every rank. Raises ConfigError for unusable folders.
    """
    import torch._dynamo.polyfills.loader
    from transformers import AutoModelForCausalLM

    pristine = load_model_config(path, where)
    config = copy.deepcopy(pristine)
    for name in _DROPOUTS:
        if getattr(config, name, None):
            setattr(config, name, 0.0)
    config.use_cache = False
    shards = Path(path) / SHARDS if is_sharded(path) else None
    if shards is not None:
        model = _empty_model(config, DTYPES[dtype], attention)
    elif has_weights(path):
        model = load_weights(path, where, config=config, dtype=DTYPES[dtype], attn_implementation=attention)
    else:
        log = get_logger(rank_of(os.environ), "model")
        log.info(f"{where}: {path} has no weights; using random ones")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        for parameter in model.parameters():  # not the buffers: rotary frequencies stay float32, as in loaded models
            parameter.data = parameter.data.to(DTYPES[dtype])
    family = family_of(config, where)
    if family.prepare is not None:
        family.prepare(model)
    removed = _cut_vocabulary(model, vocab_size, where)
    if shards is not None:
        from safetensors.torch import load_file

        removed = load_file(shards / REMOVED_ROWS)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    checksum = hashlib.blake2b(repr(sorted(shapes.items())).encode(), digest_size=4).hexdigest()
    return LoadedModel(model, family, pristine, removed, shapes, f"{pristine.model_type}-{checksum}", shards)


def whole_model(loaded: LoadedModel) -> nn.Module:
    """The model for one plain process, which does not cut it: a sharded one takes its weights here.

    Raises CheckpointError where its files do not have them.
    """
    if loaded.shards is not None:
        shards = ShardReader(loaded.shards)
        for name, parameter in loaded.model.named_parameters():
            run = shards.read(WEIGHT, name, ShardSpec(loaded.shapes[name]), 0, 0, parameter.numel())
            parameter.data.copy_(run.view_as(parameter))
    return loaded.model


def _empty_model(config: Any, dtype: torch.dtype, attention: str) -> nn.Module:
    """A model whose weights are memory that nobody has touched: none of it is used until it is cut."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():
        parameter.data = torch.empty_like(parameter, dtype=dtype)
    model.tie_weights()
    return model


def _cut_vocabulary(model: nn.Module, vocab_size: int, where: str) -> dict[str, torch.Tensor]:
    """Drops padded rows past ``vocab_size``: they are cut, never masked with -inf (method.md section 5)."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight.shape[0] < vocab_size:
        raise ConfigError(
            f"{where}: the model has {head.weight.shape[0]} vocabulary rows, the tokenizer needs {vocab_size}"
        )
    if head.weight.shape[0] == vocab_size:
        return {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    removed: dict[str, torch.Tensor] = {}
    is_tied = head.weight is embedding.weight
    for module, attribute in ((head, "weight"), (head, "bias")):
        full = getattr(module, attribute, None)
        if full is None:
            continue
        removed[names[id(full)]] = full.data[vocab_size:].clone()
        setattr(module, attribute, nn.Parameter(full.data[:vocab_size].contiguous()))
    if is_tied:
        embedding.weight = head.weight
        embedding.num_embeddings = vocab_size
        if embedding.padding_idx is not None and embedding.padding_idx >= vocab_size:
            embedding.padding_idx = None
    head.out_features = vocab_size
    return removed


def shared_vocab_size(teacher_rows: int | None, student_rows: int, tokenizer_size: int) -> int:
    """Logical vocabulary of a run: what teacher and student share.

    Models may hold padded rows beyond the tokenizer; these are cut. Raises ConfigError when either has fewer rows than
    the tokenizer has tokens.
    """
    for name, rows in (("teacher", teacher_rows), ("student", student_rows)):
        if rows is not None and rows < tokenizer_size:
            raise ConfigError(
                f"model.{name}: {rows} vocabulary rows, but the tokenizer has {tokenizer_size} tokens; "
                "teacher and student may differ in padded rows only"
            )
    return tokenizer_size
