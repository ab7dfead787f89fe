"""Section ``parallel`` of the configuration: how models are partitioned, and where what is not in use waits."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megadistill.config.section import NonNegativeInt, PositiveInt, Section, require_combination

_WORD = {1: "1, 2 or 3", 3: "3"}


class ZeroSection(Section):
    """Section ``parallel.zero``."""

    overlap_comm: Literal["auto"] | bool = Field(
        "auto",
        description="ZeRO 1 to 3: communicate on a stream of its own while the model computes; auto: on GPUs. ZeRO 1 "
        "and 2 then hold two reduce buckets.",
    )
    reduce_bucket_size: Literal["auto"] | PositiveInt = Field(
        "auto",
        description="ZeRO 1 to 3: elements of gradients that are reduced in one call; a buffer of that size, in "
        "optim.gradient_dtype. auto: 1e8, or the parameters of the student where it has fewer.",
    )
    prefetch_bucket_size: NonNegativeInt = Field(
        50_000_000, description="ZeRO 3: elements of parameters that are gathered ahead of their use."
    )
    param_persistence_threshold: NonNegativeInt = Field(
        100_000, description="ZeRO 3: parameters of fewer elements are whole on every rank all the time."
    )
    max_live_parameters: NonNegativeInt = Field(
        1_000_000_000, description="ZeRO 3: elements of gathered parameters at a time before any is released."
    )
    max_reuse_distance: NonNegativeInt = Field(
        1_000_000_000,
        description="ZeRO 3: a parameter stays gathered where it is used again within so many elements of others; "
        "0 releases each layer after its use.",
    )
    hpz_partition_size: PositiveInt = Field(
        1,
        description="ZeRO 3: data-parallel ranks, of one machine, that together keep the weights once more (hpZ): all "
        "but the first gathering after an update is among them. 1: none.",
    )


# The lowest ZeRO stage at which a key has an effect.
_FROM_STAGE = {name: 1 if name in ("overlap_comm", "reduce_bucket_size") else 3 for name in ZeroSection.model_fields}


class ParallelSection(Section):
    """Section ``parallel``."""

    tp_size: Literal["auto"] | PositiveInt = Field(
        "auto",
        description="Tensor-parallel ranks; auto: the largest number that divides the processes and all head counts.",
    )
    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(3, description="DeepSpeed ZeRO stage of teacher and student.")
    zero: ZeroSection = Field(default_factory=ZeroSection, description="ZeRO's buffers and when it communicates.")
    offload: Literal["none", "optimizer", "teacher", "both"] = Field(
        "none",
        description="What waits in host memory while it is not in use. optimizer: float32 weights and AdamW's moments, "
        "between updates; teacher: its weights, which are brought in layer by layer.",
    )
    timeout_s: PositiveInt = Field(
        1800, description="Seconds after which a collective that has not completed ends the job."
    )

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer's state waits in host memory between updates."""
        return self.offload in ("optimizer", "both")

    @property
    def offloads_teacher(self) -> bool:
        """Whether the teacher's weights wait in host memory."""
        return self.offload in ("teacher", "both")

    @model_validator(mode="after")
    def _secondary_partitions(self) -> "ParallelSection":
        require_combination(
            self.zero.hpz_partition_size == 1 or not self.offloads_teacher,
            f"parallel.offload={self.offload} moves the teacher's weights off the device, and "
            f"parallel.zero.hpz_partition_size={self.zero.hpz_partition_size} keeps them there once more",
            ("parallel.offload", "parallel.zero.hpz_partition_size"),
        )
        return self

    @model_validator(mode="after")
    def _stages(self) -> "ParallelSection":
        for name, stage in self.without_effect():
            value = str(getattr(self.zero, name)).lower()
            require_combination(
                False,
                f"parallel.zero.{name}={value} has an effect with parallel.zero_stage {_WORD[stage]} only, and this is "
                f"{self.zero_stage}",
                (f"parallel.zero.{name}", "parallel.zero_stage"),
            )
        return self

    def without_effect(self) -> Iterator[tuple[str, int]]:
        """Keys of ``zero`` that this stage does not use, where they are not the default, and from which stage on."""
        for name, field in ZeroSection.model_fields.items():
            if self.zero_stage < _FROM_STAGE[name] and getattr(self.zero, name) != field.default:
                yield name, _FROM_STAGE[name]
