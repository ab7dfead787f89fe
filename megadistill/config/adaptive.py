"""Sections of ``loss`` for what changes with training: the teacher (TAID), tokens and their temperatures (AdaKD)."""

from pydantic import Field

from megadistill.config.section import (
    BelowOne,
    NonNegativeFloat,
    OpenUnitInterval,
    Section,
    TopP,
    UnitInterval,
    require_combination,
)


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


class AdakdSection(Section):
    """Section ``loss.adakd``."""

    enabled: bool = Field(
        False, description="Train on the hardest tokens of each step, each at a temperature of its own; no mask."
    )
    temperature_scale: NonNegativeFloat = Field(
        0.5, description="c: temperatures are exp(-c) to exp(c) times loss.temperature, low for hard tokens."
    )
    share_step: OpenUnitInterval = Field(
        0.05, description="delta: how much the share of trained tokens changes at a time, relative to itself."
    )
    tolerance: OpenUnitInterval = Field(
        0.05, description="eps: how far the average loss moves before the share changes, relative to itself."
    )
    min_share: TopP = Field(0.1, description="Smallest share of trained tokens.")
    beta: BelowOne = Field(0.99, description="Momentum of the average loss.")
    warmup: BelowOne = Field(0.05, description="Share of the run in which all tokens are trained on.")


def check_taid(taid: TaidSection, *, dac_kl: float, policy: float) -> None:
    """Raises pydantic's error for combinations that would be wrong or without effect."""
    if not taid.enabled:
        _require_defaults("loss.taid", taid)
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


def check_adakd(
    adakd: AdakdSection, *, dac_kl: float, span: float, policy: float, average: str, is_clipped: bool
) -> None:
    """Raises pydantic's error for combinations that would be wrong or without effect."""
    if not adakd.enabled:
        _require_defaults("loss.adakd", adakd)
        return
    for key, is_fine, reason in (
        ("loss.dac_kl=0", dac_kl > 0, "there is no token loss to choose tokens for"),
        ("a mask (loss.divergence=dac_kl)", not is_clipped, "it has no masks; set loss.divergence=forward_kl, say"),
        (f"loss.span={span:g}", span == 0, "spans need all tokens at one temperature; set loss.span to 0"),
        (f"loss.policy={policy:g}", policy == 0, "it needs all tokens; set loss.policy to 0"),
        (f"loss.average={average}", average == "token", "rows may have no such token; set loss.average to token"),
    ):
        names = ("loss.divergence",) if key.startswith("a mask") else (key.partition("=")[0],)
        require_combination(is_fine, f"loss.adakd.enabled=true with {key}: {reason}", ("loss.adakd.enabled", *names))


def _require_defaults(where: str, section: Section) -> None:
    for name, value in section:
        require_combination(
            value == type(section).model_fields[name].default,
            f"{where}.{name}={value:g} has no effect with {where}.enabled=false",
            (f"{where}.{name}", f"{where}.enabled"),
        )
