"""Which tensor of a model's files is which parameter; everything that transformers lets pass is refused or said.

Models are loaded by ``placed_tensors``. ``load_weights`` lets transformers load: for peft, and for the proof of a
conversion by transformers alone. Tests hold the first to the second.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from megadistill.data.hub import split_revision
from megadistill.errors import ConfigError, first_line
from megadistill.models.weight_files import StoredTensor
from megadistill.observability.log import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# A weight of a numbered layer, but for the buffers that older versions of transformers saved beside the weights.
_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.(?!.*(?:masked_bias|inv_freq)$)")


def load_weights(path: str, where: str, *, rank: int = 0, **options: Any) -> PreTrainedModel:
    """A causal language model of transformers with its weights.

    Whether head and embedding are one is what the file says: transformers keeps them apart where it holds two that
    differ, whatever config.json says. ``config.tie_word_embeddings`` of the result is true to that.

    Args:
        path: A model folder or a hub name.
        where: The key or option that names the model; errors begin with it.
        rank: Rank 0 logs what of the file is not as config.json says.
        options: Those of ``from_pretrained``.

    Raises:
        ConfigError: Weights cannot be read, some are missing, or some have no place in the model.
    """
    from transformers import AutoModelForCausalLM

    name, revision = split_revision(path)
    try:
        with _quiet_transformers():
            loaded: tuple[PreTrainedModel, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(
                name, revision=revision, output_loading_info=True, **options
            )  # type: ignore[assignment]  # with output_loading_info it is a pair, which its annotation leaves out
        model, info = loaded
    except Exception as error:
        raise ConfigError(f"{where}: cannot load the weights in '{path}': {first_line(error)}") from error
    _refuse_missing(info["missing_keys"], path, where)
    _report_unused(info["unexpected_keys"], model, path, where, rank)
    if model.config.tie_word_embeddings and not is_tied(model):
        _report_own_head(path, where, rank)
    model.config.tie_word_embeddings = is_tied(model)
    return model


def placed_tensors(
    model: PreTrainedModel, tensors: Mapping[str, StoredTensor], path: str, where: str, *, rank: int = 0
) -> dict[str, StoredTensor]:
    """Finds the tensor of each parameter, by the rules of transformers.

    A tensor is called what the parameter is called, or lacks the prefix of the family's base model ("model.",
    "transformer."), as in files that were saved from one. Head and embedding that the configuration ties stay apart
    where the files hold two that differ: the head gets a parameter of its own, and ``config.tie_word_embeddings`` is
    set to false.

    Args:
        model: The model, as transformers makes it of the configuration. Only names and shapes count.
        tensors: Those of the files, by name.
        path: What the user named.
        where: The key or option that names the model; errors begin with it.
        rank: Rank 0 logs what of the files is not as config.json says.

    Returns:
        Name of each parameter -> its tensor.

    Raises:
        ConfigError: A tensor is missing or there twice, has another shape, holds no floating-point numbers, or belongs
            to a layer that has no place for it.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    prefix = f"{model.base_model_prefix}."
    placed: dict[str, StoredTensor] = {}
    unused = []
    for key, stored in tensors.items():
        name = key if key in shapes else prefix + key
        if name in placed:
            raise ConfigError(
                f"{where}: '{path}' has both {placed[name].key} and {key}, which are one weight of its model"
            )
        if name in shapes:
            placed[name] = stored
        else:
            unused.append(key)
    for name, stored in placed.items():
        _check_stored(name, stored, shapes[name], path, where)
    if is_tied(model):
        _place_tied(model, placed, path, where, rank)
    names = [name for name, _ in model.named_parameters()]
    _refuse_missing(set(names) - placed.keys(), path, where)
    stale = model._keys_to_ignore_on_load_unexpected or ()
    _report_unused([key for key in unused if not any(re.search(each, key) for each in stale)], model, path, where, rank)
    return {name: placed[name] for name in names}


def _check_stored(name: str, stored: StoredTensor, shape: tuple[int, ...], path: str, where: str) -> None:
    if stored.shape != shape:
        raise ConfigError(
            f"{where}: in '{path}', {stored.key} has shape {list(stored.shape)}, but its config.json makes {name} "
            f"{list(shape)}: one of the two is of another model"
        )
    if not stored.dtype.is_floating_point:
        raise ConfigError(f"{where}: in '{path}', {stored.key} holds {stored.dtype}, not floating-point numbers")


def _place_tied(model: PreTrainedModel, placed: dict[str, StoredTensor], path: str, where: str, rank: int) -> None:
    """Embedding and head of a model that ties them: one tensor, or two that are equal; else the model is untied."""
    head: Any = model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    own, shared = (f"{names[id(module)]}.weight" for module in (head, model.get_input_embeddings()))
    if own not in placed:
        return
    if shared not in placed:
        placed[shared] = placed[own]
    elif not _are_equal(placed[own], placed[shared], head.weight.dtype):
        head.weight = nn.Parameter(torch.empty_like(head.weight))
        model.config.tie_word_embeddings = False
        _report_own_head(path, where, rank)


def _are_equal(one: StoredTensor, other: StoredTensor, dtype: torch.dtype) -> bool:
    """Whether two matrices are equal in the type of the run; a few rows of them are in memory at a time."""
    rows = max(1, 2**22 // max(1, one.shape[1]))
    return all(
        torch.equal(*(torch.as_tensor(each.content[start : start + rows]).to(dtype) for each in (one, other)))
        for start in range(0, one.shape[0], rows)
    )


def _refuse_missing(names: Collection[str], path: str, where: str) -> None:
    if names:
        raise ConfigError(f"{where}: '{path}' lacks {len(names)} weights of its model, {min(names)} among them")


def _report_unused(names: Collection[str], model: PreTrainedModel, path: str, where: str, rank: int) -> None:
    if unused := _unused_names(names, model.config, path, where):
        get_logger(rank, "model").warning(
            f"{where}: '{path}' has {len(unused)} weights that its model does not use, {unused[0]} among them"
        )


def _report_own_head(path: str, where: str, rank: int) -> None:
    get_logger(rank, "model").warning(
        f"{where}: the config.json of '{path}' says tie_word_embeddings, but its own head is there and used"
    )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar and no report: what is wrong with the weights is said in one line."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _unused_names(names: Collection[str], config: PreTrainedConfig, path: str, where: str) -> list[str]:
    """Weights of a file that the model does not have and that are not part of its layers (a value head).

    Raises:
        ConfigError: They belong to a layer: the file is of another model than the configuration.
    """
    of_layers = {name: int(match[1]) for name in sorted(names) if (match := _LAYER.search(name))}
    num_layers = config.num_hidden_layers
    beyond = {name: layer for name, layer in of_layers.items() if layer >= num_layers}
    if beyond:
        raise ConfigError(
            f"{where}: '{path}' has weights of layer {max(beyond.values())} (layers count from 0), but its config.json "
            f"has {num_layers} layers: one of the two is of another model"
        )
    if of_layers:
        raise ConfigError(
            f"{where}: '{path}' has {len(of_layers)} weights that have no place in the layers of its config.json, "
            f"{min(of_layers)} among them: one of the two is of another model"
        )
    return sorted(name for name in names if not name.endswith(("inv_freq", "masked_bias")))


def is_tied(model: PreTrainedModel) -> bool:
    """Whether head and embedding are one parameter."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    return head.weight is embedding.weight
