"""What goes together with the gate, and with one that learns from the student (``loss.gate_objective: student``)."""

from typing import TYPE_CHECKING, Any

from megadistill.config.loss import LossConfig
from megadistill.config.section import require_combination

if TYPE_CHECKING:
    from megadistill.config.schema import RunConfig

_OF_THE_PENALTY = ("coverage", "coverage_weight", "coverage_target")
_OF_THE_GUARDS = ("lower_max", "upper_min", *_OF_THE_PENALTY)
_WITHOUT_PENALTY = {
    "student": "which learns without the penalty on dropped mass",
    "frozen": "whose quantiles stay where they start",
}
_OF_THE_GATE = ("gate_objective", "guards", *_OF_THE_GUARDS)


def check_gate(config: "RunConfig") -> None:
    """Raises pydantic's error for settings without effect."""
    loss = config.loss
    if not loss.uses_gate:
        _needs_a_gate(loss)
    if not loss.guards:
        for name in _OF_THE_GUARDS:
            _at_default(loss, name, "loss.guards=false", "loss.guards")
    require_combination(
        loss.gate_objective != "student" or not loss.taid.enabled,
        "loss.gate_objective=student with loss.taid.enabled=true: the step ahead is judged by the teacher itself",
        ("loss.gate_objective", "loss.taid.enabled"),
    )
    if loss.gate_objective in _WITHOUT_PENALTY:
        cause = f"loss.gate_objective={loss.gate_objective}, {_WITHOUT_PENALTY[loss.gate_objective]}"
        for name in _OF_THE_PENALTY:
            _at_default(loss, name, cause, "loss.gate_objective")


def _needs_a_gate(loss: LossConfig) -> None:
    other = "clip" if loss.clip != "gate" else "divergence" if loss.divergence != "dac_kl" else "dac_kl"
    cause = (
        f"loss.{other}={_shown(getattr(loss, other))}: there is no gate; it needs loss.clip=gate, "
        "loss.divergence=dac_kl and loss.dac_kl > 0"
    )
    for name in _OF_THE_GATE:
        _at_default(loss, name, cause, f"loss.{other}")


def _at_default(loss: LossConfig, name: str, cause: str, key: str) -> None:
    value, default = getattr(loss, name), LossConfig.model_fields[name].default
    require_combination(
        value == default, f"loss.{name}={_shown(value)} has no effect with {cause}", (f"loss.{name}", key)
    )


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
