"""Section ``optim`` of the configuration."""

from typing import Literal

from pydantic import Field

from megadistill.config.section import (
    BelowOne,
    DType,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    Section,
    UnitInterval,
)


class OptimSection(Section):
    """Section ``optim``."""

    lr: PositiveFloat = Field(1e-4, description="Peak learning rate of AdamW.")
    min_lr_ratio: UnitInterval = Field(0.1, description="Final learning rate, as a share of the peak.")
    betas: tuple[BelowOne, BelowOne] = Field((0.9, 0.95), strict=False, description="AdamW's two decay rates.")
    eps: PositiveFloat = Field(1e-6, description="AdamW's epsilon.")
    weight_decay: NonNegativeFloat = Field(0.0, description="AdamW's weight decay.")
    warmup_ratio: UnitInterval = Field(0.05, description="Share of all steps in which the learning rate rises.")
    warmup_steps: NonNegativeInt | None = Field(None, description="The same in steps; overrides optim.warmup_ratio.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Learning rate after the warm-up.")
    gradient_clipping: NonNegativeFloat = Field(1.0, description="Largest norm of the gradient; 0: no clipping.")
    gradient_dtype: DType = Field(
        "fp32",
        description="Type in which a bf16 student's gradients are summed, over micro-batches and over data-parallel "
        "ranks; bf16 takes half the memory and communication and is off by 0.3 % after 4 micro-batches.",
    )
    gate_lr: PositiveFloat = Field(1e-3, description="Constant learning rate of the gate.")
