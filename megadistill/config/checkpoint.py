"""Section ``checkpoint`` of the configuration."""

from typing import Literal

from pydantic import Field, model_validator

from megadistill.config.section import NonNegativeInt, PositiveInt, Section, require_combination


class CheckpointSection(Section):
    """Section ``checkpoint``."""

    keep_last: PositiveInt = Field(2, description="Number of checkpoints to keep; older ones are removed.")
    keep_every: NonNegativeInt = Field(0, description="Also keep the checkpoints of every so many steps; 0: none.")
    keep_every_weights_only: bool = Field(
        False,
        description="Of those that only checkpoint.keep_every keeps, keep the model folder alone, as "
        "RUN/checkpoints/weights_N: a seventh of the size (bf16), and nothing to resume from.",
    )
    keep_best: Literal["eval/nll", "eval/rouge_l", "eval/exact_match"] | None = Field(
        None,
        description="Also save and keep the checkpoint of the best validation by this metric, which "
        "RUN/checkpoints/best names; null: none.",
    )
    asynchronous: bool = Field(
        True,
        description="Write during training, from a copy in host memory (over all processes 12 bytes per parameter; "
        "where there are several, 2 or 4 more for hf/).",
    )

    @model_validator(mode="after")
    def _check(self) -> "CheckpointSection":
        require_combination(
            not self.keep_every_weights_only or self.keep_every > 0,
            "checkpoint.keep_every_weights_only needs checkpoint.keep_every",
            ("checkpoint.keep_every_weights_only", "checkpoint.keep_every"),
        )
        return self
