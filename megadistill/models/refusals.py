"""Why a model's family is not one of those that can be divided among processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_PARTS = ("vision_config", "audio_config")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def reason_against(config: PreTrainedConfig) -> str:
    """The reason, as far as a configuration tells it.

    Args:
        config: Of a family that is not supported.
    """
    if any(getattr(config, part, None) is not None for part in _PARTS):
        return "it does not only read text; write its text part to a folder, and name that (docs/checkpoints.md)"
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder: it does not continue a text"
    if any(getattr(config, name, None) for name in _EXPERTS):
        return "nothing here divides a mixture of experts"
    if not getattr(config, "num_attention_heads", None):
        return "it has no attention heads to divide"
    return "nothing here knows how to divide its layers"
