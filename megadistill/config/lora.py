"""Section ``model.student.lora``: low-rank adapters are trained in place of the student's weights."""

from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from megadistill.config.section import (
    NonEmptyStr,
    NonNegativeInt,
    PositiveFloat,
    Section,
    require_combination,
)

if TYPE_CHECKING:
    from megadistill.config.schema import RunConfig


class LoraSection(Section):
    """LoRA (Hu et al., 2106.09685): each target layer computes W x + s B A x, and A and B alone are trained."""

    r: NonNegativeInt = Field(0, description="Rank of the adapters; 0: there are none, all weights are trained.")
    alpha: PositiveFloat = Field(16.0, description="The adapters' share is multiplied by alpha / r.")
    targets: tuple[NonEmptyStr, ...] = Field(
        (),
        strict=False,
        description="Names of the linear layers that get adapters, such as q_proj; none: all below the head.",
    )
    use_rslora: bool = Field(False, description="Multiply by alpha / sqrt(r) (rank-stabilized LoRA) instead.")

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.r == 0:
            for name, field in type(self).model_fields.items():
                require_combination(
                    getattr(self, name) == field.default,
                    f"model.student.lora.{name} has no effect with model.student.lora.r=0",
                    (f"model.student.lora.{name}", "model.student.lora.r"),
                )
        return self

    @property
    def enabled(self) -> bool:
        """Whether there are adapters."""
        return self.r > 0

    @property
    def scale(self) -> float:
        """s: what B A x is multiplied by."""
        return self.alpha / (self.r**0.5 if self.use_rslora else self.r)


def check_lora(config: "RunConfig") -> None:
    """Raises pydantic's error for what adapters do not go together with."""
    require_combination(
        not config.model.student.lora.enabled or config.loss.gate_objective != "student",
        f"model.student.lora.r={config.model.student.lora.r} with loss.gate_objective=student: the step ahead is one "
        "of the student's head, which is frozen",
        ("model.student.lora.r", "loss.gate_objective"),
    )
