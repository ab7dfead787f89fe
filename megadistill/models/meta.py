"""Models without memory: the shapes of a configuration's parameters, as they are before a model is sharded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megadistill.models.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def meta_model(config: PreTrainedConfig, where: str) -> PreTrainedModel:
    """The model of a configuration on the meta device, prepared for sharding; padded rows of its head are still there.

    Args:
        config: The configuration.
        where: The key or option that names the model; errors begin with it.

    Raises:
        ConfigError: The family is not supported.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    family = family_of(config, where)
    with torch.device("meta"), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    if family.prepare is not None:
        family.prepare(model)
    return model
