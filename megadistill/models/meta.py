"""Models of configurations: as transformers makes them, and without memory, for the shapes of their parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from megadistill.errors import ConfigError, first_line
from megadistill.models.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def made_model(config: PreTrainedConfig, where: str, **options: Any) -> PreTrainedModel:
    """What transformers makes of a configuration.

    Args:
        config: The configuration.
        where: The key or option that names the model; the error begins with it.
        options: Those of ``from_config``.

    Raises:
        ConfigError: transformers makes no model of it.
    """
    from transformers import AutoModelForCausalLM

    try:
        # Not in the configuration's type: buffers such as Gemma's scale of the embedding would be rounded to it.
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **{"dtype": torch.float32, **options})
    except Exception as error:  # assertions, missing keys, negative sizes: the values do not fit together
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"{where}: transformers can make no model of its configuration: {reason}") from error
    return model


def meta_model(config: PreTrainedConfig, where: str) -> PreTrainedModel:
    """The model of a configuration on the meta device, prepared for sharding; padded rows of its head are still there.

    Args:
        config: The configuration.
        where: The key or option that names the model; errors begin with it.

    Raises:
        ConfigError: The family is not supported, or transformers makes no model of the configuration.
    """
    from transformers.initialization import no_init_weights

    family = family_of(config, where)
    with torch.device("meta"), no_init_weights():
        model = made_model(config, where)
    model.tie_weights()
    if family.prepare is not None:
        family.prepare(model)
    return model
