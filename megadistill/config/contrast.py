"""Settings of two rows a prompt (``generation.mode`` contrast): where they have an effect, and which fit together."""

from typing import TYPE_CHECKING

from megadistill.config.loss import SKEWED, LossConfig
from megadistill.config.section import require_combination

if TYPE_CHECKING:
    from megadistill.config.schema import RunConfig

_KEYS = ("divergence_teacher_text", "adaptive_skew", "student_text_weight")


def check_contrast(config: "RunConfig") -> None:
    """Raises pydantic's error for combinations that would be wrong or without effect."""
    loss, mode = config.loss, config.generation.mode
    for key in _KEYS:
        value = getattr(loss, key)
        is_default = value == LossConfig.model_fields[key].default
        shown = f"{value:g}" if isinstance(value, float) else str(value).lower()
        require_combination(
            is_default or mode == "contrast",
            f"loss.{key}={shown} has no effect with generation.mode={mode}: only contrast has rows of two kinds",
            (f"loss.{key}", "generation.mode"),
        )
        require_combination(
            is_default or loss.dac_kl > 0,
            f"loss.{key}={shown} has no effect with loss.dac_kl=0",
            (f"loss.{key}", "loss.dac_kl"),
        )
    if mode != "contrast":
        return
    require_combination(
        not loss.adakd.enabled,
        "loss.adakd.enabled=true with generation.mode=contrast: it takes one loss for all rows",
        ("loss.adakd.enabled", "generation.mode"),
    )
    both = (loss.divergence, loss.divergence_teacher_text or loss.divergence)
    require_combination(
        both[0] == both[1] or "dac_kl" not in both,
        f"loss.divergence={both[0]} with loss.divergence_teacher_text={both[1]}: the mask of dac_kl is for both texts "
        "or for none; forward_kl is what it is without a mask",
        ("loss.divergence", "loss.divergence_teacher_text"),
    )
    require_combination(
        not loss.adaptive_skew or set(both) <= SKEWED,
        f"loss.adaptive_skew=true needs skewed divergences on both texts ({' or '.join(sorted(SKEWED))}), not "
        f"loss.divergence={both[0]} and {both[1]} on the teacher's text",
        ("loss.adaptive_skew", "loss.divergence", "loss.divergence_teacher_text"),
    )
    require_combination(
        not loss.adaptive_skew or loss.skew >= 0.01,
        f"loss.adaptive_skew=true with loss.skew={loss.skew:g}: a row's skew is between 0.01 and loss.skew",
        ("loss.adaptive_skew", "loss.skew"),
    )
