"""What goes together with a gate that learns from the student (``loss.gate_objective: student``)."""

from typing import TYPE_CHECKING

from megadistill.config.loss import LossConfig
from megadistill.config.section import require_combination

if TYPE_CHECKING:
    from megadistill.config.schema import RunConfig

_OF_THE_PENALTY = ("coverage", "coverage_weight", "coverage_target")


def check_gate(config: "RunConfig") -> None:
    """Raises pydantic's error for settings without effect."""
    loss = config.loss
    if loss.gate_objective != "student":
        return
    cause = "clip" if loss.clip != "gate" else "divergence" if loss.divergence != "dac_kl" else "dac_kl"
    require_combination(
        loss.uses_gate,
        f"loss.gate_objective=student with loss.{cause}={getattr(loss, cause)}: there is no gate that could learn; it "
        "needs loss.clip=gate, loss.divergence=dac_kl and loss.dac_kl > 0",
        ("loss.gate_objective", f"loss.{cause}"),
    )
    require_combination(
        not loss.taid.enabled,
        "loss.gate_objective=student with loss.taid.enabled=true: the step ahead is judged by the teacher itself",
        ("loss.gate_objective", "loss.taid.enabled"),
    )
    for name in _OF_THE_PENALTY:
        value, default = getattr(loss, name), LossConfig.model_fields[name].default
        require_combination(
            value == default,
            f"loss.{name}={value} has no effect with loss.gate_objective=student, which learns without the penalty on "
            f"dropped mass; leave it at {default}",
            ("loss.gate_objective", f"loss.{name}"),
        )
