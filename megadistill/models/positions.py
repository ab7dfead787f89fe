"""How long a text a model can read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megadistill.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def check_positions(config: PreTrainedConfig, max_tokens: int, what: str, where: str) -> None:
    """Checks that a model can read sequences of some length.

    Args:
        config: The model's configuration.
        max_tokens: The length.
        what: The setting that asks for it.
        where: The key or option that names the model.

    Raises:
        ConfigError: The model has fewer positions, or its rotary ones depend on the batch.
    """
    rotary = getattr(config, "rope_parameters", None) or {}
    if rotary.get("rope_type") == "longrope":
        short = rotary.get("original_max_position_embeddings") or config.original_max_position_embeddings
        if max_tokens > short:
            # transformers chooses its frequencies by the longest example of a batch: one would depend on the others.
            raise ConfigError(
                f"{what}={max_tokens}, but {where} has rotary positions of type longrope, which are supported up to "
                f"{short} tokens: beyond, each example's depend on the longest one of its batch"
            )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and max_tokens > longest:
        raise ConfigError(f"{what}={max_tokens}, but {where} reads at most {longest} positions")
