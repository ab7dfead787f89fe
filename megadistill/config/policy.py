"""Which text the policy gradient (``loss.policy``) may be computed on, and how mode ``teacher_mixed`` draws."""

from typing import TYPE_CHECKING

from megadistill.config.loss import LossConfig
from megadistill.config.section import require_combination

if TYPE_CHECKING:
    from megadistill.config.schema import RunConfig


def check_policy(config: "RunConfig") -> None:
    """Raises pydantic's error for combinations that would be wrong or without effect."""
    loss, generation = config.loss, config.generation
    mode, is_mixed = generation.mode, generation.mode == "teacher_mixed"
    require_combination(
        not is_mixed or generation.sampling_temperature > 0,
        "generation.mode=teacher_mixed draws its tokens: generation.sampling_temperature must be more than 0",
        ("generation.mode", "generation.sampling_temperature"),
    )
    if loss.policy == 0:
        return
    weight = f"loss.policy={loss.policy:g}"
    require_combination(
        mode in ("on_policy", "teacher_mixed"),
        f"{weight} with generation.mode={mode}: what the text was drawn from is known only where it has just been "
        "written; use on_policy or teacher_mixed",
        ("loss.policy", "generation.mode"),
    )
    require_combination(
        is_mixed or not generation.scrg.enabled,
        f"{weight} with generation.scrg.enabled=true: corrected text is not drawn from the student; set it to false",
        ("loss.policy", "generation.scrg.enabled"),
    )
    require_combination(
        generation.sampling_temperature == 1 and generation.top_k == 0 and generation.top_p == 1,
        f"{weight} needs text drawn from whole distributions: generation.sampling_temperature=1, top_k=0 and top_p=1, "
        f"not {generation.sampling_temperature:g}, {generation.top_k} and {generation.top_p:g}",
        ("loss.policy", "generation.sampling_temperature", "generation.top_k", "generation.top_p"),
    )
    is_default = loss.policy_clip == LossConfig.model_fields["policy_clip"].default
    require_combination(
        is_mixed or is_default,
        f"loss.policy_clip={loss.policy_clip:g} has no effect with generation.mode={mode}: text is trained on once, so "
        "all importance weights are 1",
        ("loss.policy_clip", "generation.mode"),
    )
    require_combination(
        loss.policy_reward == "return" or is_default,
        f"loss.policy_clip={loss.policy_clip:g} has no effect with loss.policy_reward={loss.policy_reward}: a weight "
        "is below 1 just where that reward is positive",
        ("loss.policy_clip", "loss.policy_reward"),
    )
