"""The only place that writes DeepSpeed keys: the JSON of an engine, generated from the configuration of the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megadistill.config.deepspeed import ZERO_KEYS
from megadistill.config.optim import OptimSection
from megadistill.config.parallel import ZeroSection
from megadistill.config.schema import TrainSection
from megadistill.errors import ConfigError
from megadistill.files import did_you_mean
from megadistill.models.families import Family

# Elements of the largest reduce bucket: 0.4 GB in float32. DeepSpeed's own default is 5e8, for a model of any size.
_MAX_BUCKET = 100_000_000


def engine_config(
    *,
    zero_stage: int,
    tp_size: int,
    dtype: str,
    family: Family,
    micro_batch_size: int,
    zero: ZeroSection,
    device_type: str,
    gradient_accumulation_steps: int = 1,
    gradient_clipping: float = 0.0,
    passed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """DeepSpeed's configuration of one engine.

    Args:
        zero_stage: ZeRO stage.
        tp_size: Tensor-parallel size.
        dtype: Type of the weights, "fp32" or "bf16".
        family: The model's family.
        micro_batch_size: Examples of a forward pass on one rank.
        zero: The run's ``parallel.zero``.
        device_type: Where the model computes: "cuda" or "cpu".
        gradient_accumulation_steps: Micro-steps of an update.
        gradient_clipping: Largest norm of the gradient; always written, because DeepSpeed clips at 1.0 where it is
            absent.
        passed: The run's ``deepspeed`` section, which is merged over the rest.

    Raises:
        ConfigError: DeepSpeed does not take a setting of its ``zero_optimization``.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "gradient_clipping": gradient_clipping,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": _zero(zero_stage, zero, device_type),
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if tp_size > 1:
        config["tensor_parallel"] = {"autotp_size": tp_size, "vocab_parallel_lm_head": True}
        if family.partition_config is not None:
            config["tensor_parallel"]["partition_config"] = family.partition_config
    if not passed:
        return config
    merged = _merged(config, passed)
    _check(merged["zero_optimization"])
    return merged


def _check(zero: Mapping[str, Any]) -> None:
    """Raises ConfigError for what DeepSpeed does not take: a model is loaded, or a step predicted, after this."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        hint = did_you_mean(key, DeepSpeedZeroConfig.model_fields)
        raise ConfigError(f"deepspeed.zero_optimization.{key}: {first['msg']}{hint}") from None


def _zero(stage: int, zero: ZeroSection, device_type: str) -> dict[str, Any]:
    """``zero_optimization`` but for the reduce bucket, which only a trained engine has."""
    overlap = device_type == "cuda" if zero.overlap_comm == "auto" else zero.overlap_comm
    config: dict[str, Any] = {"stage": stage, "overlap_comm": overlap and stage > 0}
    if stage == 3:
        config["stage3_gather_16bit_weights_on_model_save"] = True
        config |= {theirs: getattr(zero, ours) for theirs, ours in ZERO_KEYS.items() if theirs.startswith("stage3_")}
    return config


def student_config(
    optim: OptimSection,
    train: TrainSection,
    *,
    zero_stage: int,
    tp_size: int,
    dp_size: int,
    dtype: str,
    family: Family,
    zero: ZeroSection,
    device_type: str,
    num_elements: int,
    passed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The student's engine: gradients accumulated, reduced and clipped as the run asks for.

    With a budget of tokens DeepSpeed is told of the most passes that there can be, one for each example: what it keeps
    for several is then there. It does not count passes by it (``Student.forward``).

    Args:
        optim: Settings of AdamW.
        train: Settings of the batches.
        zero_stage: ZeRO stage.
        tp_size: Tensor-parallel size.
        dp_size: Data-parallel size.
        dtype: Type of the weights.
        family: The model's family.
        zero: The run's ``parallel.zero``.
        device_type: Where the model computes.
        num_elements: Parameters that are trained.
        passed: The run's ``deepspeed`` section.
    """
    rows = 1 if train.micro_batch_tokens is not None else train.micro_batch_size
    config = engine_config(
        zero_stage=zero_stage,
        tp_size=tp_size,
        dtype=dtype,
        family=family,
        micro_batch_size=rows,
        gradient_accumulation_steps=train.global_batch_size // (rows * dp_size),
        gradient_clipping=0.0 if clips_itself(zero_stage, dtype) else optim.gradient_clipping,
        zero=zero,
        device_type=device_type,
        passed=passed,
    )
    bucket = min(_MAX_BUCKET, num_elements) if zero.reduce_bucket_size == "auto" else zero.reduce_bucket_size
    config["zero_optimization"]["reduce_bucket_size"] = bucket
    if needs_wide_gradients(dtype, optim):
        config["communication_data_type"] = "fp32"
        if zero_stage > 0:  # stage 0 has no such setting: trained_model
            config["data_types"] = {"grad_accum_dtype": "fp32"}
            config["bf16"]["immediate_grad_update"] = True  # stage 1 frees a bf16 gradient once it has been added
    return config


def needs_wide_gradients(dtype: str, optim: OptimSection) -> bool:
    """Whether gradients are summed in a wider type than that of the weights."""
    return dtype == "bf16" and optim.gradient_dtype == "fp32"


def clips_itself(zero_stage: int, dtype: str) -> bool:
    """Whether the student clips its gradients in DeepSpeed's place, whose norm is that of one shard there."""
    return zero_stage == 0 and dtype == "bf16"


def teacher_config(
    *,
    zero_stage: int,
    tp_size: int,
    dtype: str,
    family: Family,
    zero: ZeroSection,
    device_type: str,
    passed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The configuration of an engine that is never trained.

    It has no optimizer, so stages 1 and 2 have nothing to partition: they mean 0 here.
    """
    return engine_config(
        zero_stage=3 if zero_stage == 3 else 0,
        tp_size=tp_size,
        dtype=dtype,
        family=family,
        micro_batch_size=1,
        zero=zero,
        device_type=device_type,
        passed=passed,
    )


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings merged key by key; anything else of ``over`` wins."""
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        merged[key] = _merged(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return merged
