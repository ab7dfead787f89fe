"""Models from a folder, a hub name, or a configuration alone (random weights), ready to be sharded.

Loading reads names and shapes and makes a model whose weights are memory that nothing has touched. Whoever has sharded
it fills it from ``LoadedModel.weights``, one parameter after the other, with its own slices alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from megadistill.data.hub import check_name, is_hub_name, offline, offline_if_needed, own_code, split_revision
from megadistill.errors import ConfigError, first_line
from megadistill.files import did_you_mean_path
from megadistill.models.adapter_files import AdapterFolder
from megadistill.models.families import Family, family_of, has_own_head
from megadistill.models.fingerprint import fingerprint_of
from megadistill.models.folder_checks import (
    SHARDS,
    check_folder,
    check_not_quantized,
    check_sizes,
    has_weights,
    is_sharded,
)
from megadistill.models.meta import made_model
from megadistill.models.shard_spec import ShardSpec
from megadistill.models.shards import WEIGHT, ShardReader
from megadistill.models.tensor_reader import TensorReader
from megadistill.models.weight_files import ReadMode, StoredTensor, open_tensors, weight_files
from megadistill.models.weights import is_tied, placed_tensors
from megadistill.observability.log import get_logger
from megadistill.parallel.node import Node

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from megadistill.models.lora import Lora

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_DROPOUTS = (
    "dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop",
    "layerdrop", "summary_first_dropout",
)  # fmt: skip
REMOVED_ROWS = "removed_rows.safetensors"


class WeightSource(Protocol):
    """Where a model's weights come from: ``models.shards.ShardReader`` or ``models.tensor_reader.TensorReader``."""

    info: dict[str, Any]

    @property
    def kinds(self) -> Collection[str]:
        """Kinds of tensors that it has."""
        ...

    def stream(self, names: Iterable[str]) -> Iterator[str]:
        """Names in the order in which they are read best; may be collective (``TensorReader.stream``)."""
        ...

    def read(self, kind: str, name: str, spec: ShardSpec, tp_rank: int, start: int, end: int) -> torch.Tensor:
        """A run of a parameter's shard."""
        ...


@dataclass(frozen=True)
class LoadedModel:
    """A model on the CPU before it is sharded, and where its weights come from.

    Attributes:
        model: The model, with the first V rows of its head. Its weights are not filled in.
        family: Its family.
        config: The untouched configuration, for exports, but for ``tie_word_embeddings``, which is as the weights are.
        removed_rows: Parameter -> its padded vocabulary rows [rows - V, ...], so that an export has the shapes that
            the model was loaded with.
        shapes: Parameter -> whole shape.
        fingerprint: Stands for the shapes.
        weights: Where its weights come from; None where they have been filled in.
        lora: Its adapters, where they alone are trained.
    """

    model: PreTrainedModel
    family: Family
    config: PreTrainedConfig
    removed_rows: dict[str, torch.Tensor]
    shapes: dict[str, tuple[int, ...]]
    fingerprint: str
    weights: WeightSource | None
    lora: Lora | None = None


def load_model_config(path: str, where: str) -> PreTrainedConfig:
    """The transformers configuration of a model.

    Args:
        path: A model folder, a configuration file (.json), or a hub name.
        where: The configuration key or option that names the model; errors begin with it.

    Raises:
        ConfigError: There is no configuration, or no supported one; the model is quantized, or a folder without its
            weights.
    """
    from transformers import AutoConfig

    check_name(path, where)
    offline_if_needed([path])
    check_folder(path, where)
    try:
        name, revision = split_revision(path)
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for one cause: this name leads to no configuration
        hint = "" if Path(path).exists() else did_you_mean_path(path)
        reason = f"{own_code(error) or first_line(error).rstrip('.')}{hint}"
        raise ConfigError(f"{where}: cannot read a model configuration from '{path}': {reason}") from error
    check_not_quantized(config, path, where)
    family_of(config, where)
    check_sizes(config, path, where)
    return config


def load_model(
    path: str,
    *,
    dtype: str,
    vocab_size: int,
    seed: int,
    attention: str,
    where: str,
    rank: int = 0,
    read: ReadMode = "map",
    node: Node | None = None,
) -> LoadedModel:
    """Opens (or, from a configuration alone, randomly makes) a causal language model with dropout off.

    Args:
        path: A model folder, a configuration file, or a hub name.
        dtype: A key of ``DTYPES``.
        vocab_size: V: the head (and a tied embedding) keeps its first V rows.
        seed: Determines random weights, which are therefore the same on every rank.
        attention: Attention implementation of transformers.
        where: The key or option that names the model; errors begin with it.
        rank: Rank 0 logs that weights are random, and what of the file is not as config.json says, and shows progress.
        read: How the weights are read: mapped into memory, or by system calls.
        node: With ``copy``, each tensor is read by one rank of the node, which sends it to the others.

    Raises:
        ConfigError: The model cannot be used.
    """
    pristine = load_model_config(path, where)
    config, family, wanted = _without_dropout(pristine), family_of(pristine, where), DTYPES[dtype]
    attention = family.attention_for(attention, where, rank)
    shards = ShardReader(Path(path) / SHARDS) if is_sharded(path) else None
    if shards is not None:
        config.tie_word_embeddings = not has_own_head(shards.shard_specs)
    tensors: dict[str, StoredTensor] = {}
    if shards is not None or has_weights(path):
        model = _weightless_model(config, wanted, attention, where)
    else:
        get_logger(rank, "model").info(f"{where}: {path} is a configuration file: its weights are random")
        model = _random_model(config, wanted, attention, seed, where)
    if shards is None and has_weights(path):
        tensors = _placed(model, family, path, where, read, rank)
    pristine.tie_word_embeddings = is_tied(model)
    removed = _prepare(model, family, vocab_size, where)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    weights: WeightSource
    if shards is not None:
        shards.refuse_others(shapes)
        weights, removed = shards, shards.whole_file(REMOVED_ROWS)
    elif tensors:
        sender = node if read == "copy" and node is not None and node.group is not None else None
        weights = TensorReader(tensors, wanted, family.transposed, what=f"load {path}", rank=rank, node=sender)
        removed = {name: tensors[name].content[vocab_size:].to(wanted, copy=True) for name in removed}
    else:
        weights = TensorReader(_in_memory(model), wanted)
    _set_parameters(model, torch.empty_like, "cpu")
    return LoadedModel(model, family, pristine, removed, shapes, fingerprint_of(pristine, shapes), weights)


def _placed(
    model: PreTrainedModel, family: Family, path: str, where: str, read: ReadMode, rank: int
) -> dict[str, StoredTensor]:
    """Parameter -> its tensor in the files; of a folder with adapters, those of the base with the adapters merged."""
    adapters = AdapterFolder.of(path, where)
    source = path if adapters is None else adapters.base
    files = weight_files(source, where, getattr(model.config, "transformers_weights", None))
    stored = {family.parameter_name(name): t for name, t in open_tensors(files, source, where, read).items()}
    tensors = placed_tensors(model, stored, source, where, rank=rank)
    return tensors if adapters is None else adapters.merged_into(tensors, family, where)


def _without_dropout(pristine: PreTrainedConfig) -> PreTrainedConfig:
    config = copy.deepcopy(pristine)
    for name in _DROPOUTS:
        if getattr(config, name, None):
            setattr(config, name, 0.0)
    config.use_cache = False
    return config


def load_model_on_ranks(path: str, node: Node, **options: Any) -> LoadedModel:
    """``load_model`` on all ranks of a run, where each node downloads a hub name once.

    Collective over the world for a hub name: the first rank of each node downloads, then the others read the cache.

    Args:
        path: As for ``load_model``.
        node: The ranks of this machine.
        options: As for ``load_model``.

    Raises:
        ConfigError: The model cannot be used; for a hub name, on all ranks.
    """

    def load() -> LoadedModel:
        return load_model(path, rank=node.context.rank, node=node, **options)

    return node.one_first(load, offline) if is_hub_name(path) else load()


def whole_model(loaded: LoadedModel, device: torch.device) -> PreTrainedModel:
    """The model for one plain process, which does not shard it, with its weights and in evaluation mode.

    On the CPU, weights of mapped files stay mapped where the files have the model's type.

    Args:
        loaded: The model.
        device: Where it goes.

    Raises:
        CheckpointError: Files are missing or damaged.
    """
    if loaded.weights is not None:
        _fill(loaded.model, loaded.weights, WEIGHT, device)
    loaded.model.to(device)  # type: ignore[arg-type]  # transformers wraps it as if it were a plain function
    return loaded.model.eval()


def model_from_shards(config: PreTrainedConfig, shards: ShardReader, kind: str, dtype: torch.dtype) -> PreTrainedModel:
    """A whole model made of the files of all ranks, in evaluation mode on the CPU.

    Args:
        config: Its configuration; head and embedding are one where the files hold one, whatever it says.
        shards: The files.
        kind: Which tensors of theirs are the weights.
        dtype: The type that the weights are cast to.

    Raises:
        CheckpointError: The files are those of another model, or incomplete.
    """
    config, where = copy.deepcopy(config), str(shards.folder)
    config.tie_word_embeddings = not has_own_head(shards.shard_specs)
    model = _weightless_model(config, dtype, "eager", where)
    head: Any = model.get_output_embeddings()
    name = next(name for name, parameter in model.named_parameters() if parameter is head.weight)
    _prepare(model, family_of(config, where), shards.spec_of(name).shape[0], where)
    _set_parameters(model, torch.empty_like, "cpu")
    _fill(model, shards, kind, torch.device("cpu"))
    return model.eval()


def _fill(model: PreTrainedModel, weights: WeightSource, kind: str, device: torch.device) -> None:
    parameters = dict(model.named_parameters())
    for name in weights.stream(parameters):
        parameter = parameters[name]
        run = weights.read(kind, name, ShardSpec(tuple(parameter.shape)), 0, 0, parameter.numel())
        parameter.data = run.view(parameter.shape).to(device, parameter.dtype)


def _in_memory(model: PreTrainedModel) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(name, tuple(parameter.shape), parameter.dtype, parameter.data)
        for name, parameter in model.named_parameters()
    }


def _random_model(
    config: PreTrainedConfig, dtype: torch.dtype, attention: str, seed: int, where: str
) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = made_model(config, where, attn_implementation=attention)
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay float32, as in loaded models
        parameter.data = parameter.data.to(dtype)
    return model


def _weightless_model(config: PreTrainedConfig, dtype: torch.dtype, attention: str, where: str) -> PreTrainedModel:
    """A model whose parameters have shape and type, and no memory."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = made_model(config, where, attn_implementation=attention)
    model.tie_weights()
    _set_parameters(model, lambda parameter, device: torch.empty_like(parameter, dtype=dtype, device=device), "meta")
    return model


def _set_parameters(model: nn.Module, make: Callable[..., torch.Tensor], device: str) -> None:
    """Gives a model other parameters, ``make(parameter, device=device)``; those that were one stay one."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter not in made:
                made[parameter] = nn.Parameter(make(parameter.data, device=device))
            setattr(module, name, made[parameter])


def _prepare(model: PreTrainedModel, family: Family, vocab_size: int, where: str) -> dict[str, torch.Tensor]:
    """Makes transformers' model one that can be sharded; returns what ``_remove_padded_rows`` does."""
    if family.prepare is not None:
        family.prepare(model)
    return _remove_padded_rows(model, vocab_size, where)


def _remove_padded_rows(model: PreTrainedModel, vocab_size: int, where: str) -> dict[str, torch.Tensor]:
    """Drops the rows past ``vocab_size`` of the head: they are removed, never masked with -inf (method.md section 5).

    Returns:
        Parameter -> the rows that were removed.
    """
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if head.weight.shape[0] < vocab_size:
        raise ConfigError(
            f"{where}: the model has {head.weight.shape[0]} vocabulary rows, the tokenizer needs {vocab_size}"
        )
    if head.weight.shape[0] == vocab_size:
        return {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    removed: dict[str, torch.Tensor] = {}
    was_tied = is_tied(model)
    for module, attribute in ((head, "weight"), (head, "bias")):
        full = getattr(module, attribute, None)
        if full is None:
            continue
        removed[names[id(full)]] = full.data[vocab_size:].clone()
        setattr(module, attribute, nn.Parameter(full.data[:vocab_size].contiguous()))
    if was_tied:
        embedding.weight = head.weight
        embedding.num_embeddings = vocab_size
        if embedding.padding_idx is not None and embedding.padding_idx >= vocab_size:
            embedding.padding_idx = None
    head.out_features = vocab_size
    return removed


def shared_vocab_size(teacher_rows: int | None, student_rows: int, tokenizer_sizes: Collection[int]) -> int:
    """V, the vocabulary that teacher and student share: the tokens that both have rows for.

    Padded rows beyond the largest tokenizer do not count.

    Args:
        teacher_rows: Rows of the teacher's head; None without a teacher.
        student_rows: Rows of the student's head.
        tokenizer_sizes: Tokens of the run's tokenizer and of the models' own; one may have more tokens at the end.

    Raises:
        ConfigError: A model has fewer rows than the smallest tokenizer has tokens.
    """
    vocab_size, smallest = max(tokenizer_sizes), min(tokenizer_sizes)
    for name, rows in (("teacher", teacher_rows), ("student", student_rows)):
        if rows is not None and rows < smallest:
            raise ConfigError(
                f"model.{name}: {rows} vocabulary rows, but the tokenizer has {smallest} tokens; "
                "teacher and student may differ in padded rows only"
            )
        vocab_size = min(vocab_size, vocab_size if rows is None else rows)
    return vocab_size
