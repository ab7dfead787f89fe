"""A model's weights as transformers reads them, with everything that transformers lets pass refused or said."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from megadistill.errors import ConfigError, first_line
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

    try:
        with _quiet_transformers():
            loaded: tuple[PreTrainedModel, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(
                path, output_loading_info=True, **options
            )  # type: ignore[assignment]  # with output_loading_info it is a pair, which its annotation leaves out
        model, info = loaded
    except Exception as error:
        raise ConfigError(f"{where}: cannot load the weights in '{path}': {first_line(error)}") from error
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise ConfigError(f"{where}: '{path}' lacks {len(names)} weights of its model, {names[0]} among them")
    log = get_logger(rank, "model")
    if unused := _unused_names(info["unexpected_keys"], model.config, path, where):
        log.warning(f"{where}: '{path}' has {len(unused)} weights that its model does not use, {unused[0]} among them")
    if model.config.tie_word_embeddings and not is_tied(model):
        log.warning(
            f"{where}: the config.json of '{path}' says tie_word_embeddings, but its own head is there and used"
        )
    model.config.tie_word_embeddings = is_tied(model)
    return model


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
