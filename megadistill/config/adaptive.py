"""Sections of ``loss`` that change with training: the teacher that a student is given first (TAID)."""

from pydantic import Field

from megadistill.config.section import BelowOne, Section, TopP, UnitInterval, require_combination


class TaidSection(Section):
    """Section ``loss.taid``."""

    enabled: bool = Field(
        False, description="Teach by softmax((1 - t) student's logits + t teacher's), with t rising in the run."
    )
    start: BelowOne = Field(0.4, description="First t.")
    end: TopP = Field(1.0, description="Last t; 1: the teacher itself.")
    alpha: UnitInterval = Field(
        5e-4, description="What t gains in a step beyond the straight line from start to end, at most."
    )
    beta: BelowOne = Field(0.99, description="Momentum of the loss's relative change, by which t gains.")


def check_taid(taid: TaidSection, *, dac_kl: float, policy: float) -> None:
    """Raises pydantic's error for combinations that would be wrong or without effect."""
    if not taid.enabled:
        for name, value in taid:
            require_combination(
                value == TaidSection.model_fields[name].default,
                f"loss.taid.{name}={value:g} has no effect with loss.taid.enabled=false",
                (f"loss.taid.{name}", "loss.taid.enabled"),
            )
        return
    require_combination(
        taid.start < taid.end,
        f"loss.taid.start={taid.start:g} must be less than loss.taid.end={taid.end:g}",
        ("loss.taid.start", "loss.taid.end"),
    )
    require_combination(
        dac_kl > 0,
        "loss.taid.enabled=true with loss.dac_kl=0: there is no token loss to teach by, or to follow",
        ("loss.taid.enabled", "loss.dac_kl"),
    )
    require_combination(
        policy == 0,
        f"loss.taid.enabled=true with loss.policy={policy:g}: the policy gradient rewards by the teacher itself; set "
        "one of them off",
        ("loss.taid.enabled", "loss.policy"),
    )
