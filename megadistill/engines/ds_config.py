"""The only place that writes DeepSpeed keys: the JSON of an engine, generated from the configuration of the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megadistill.config.schema import OptimSection, TrainSection
from megadistill.models.families import Family


def engine_config(
    *,
    zero_stage: int,
    tp_size: int,
    dtype: str,
    family: Family,
    micro_batch_size: int,
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
        gradient_accumulation_steps: Micro-steps of an update.
        gradient_clipping: Largest norm of the gradient; always written, because DeepSpeed clips at 1.0 where it is
            absent.
        passed: The run's ``deepspeed`` section, which is merged over the rest.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "gradient_clipping": gradient_clipping,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": zero_stage, "overlap_comm": False},
    }
    if zero_stage == 3:
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if tp_size > 1:
        config["tensor_parallel"] = {"autotp_size": tp_size, "vocab_parallel_lm_head": True}
        if family.partition_config is not None:
            config["tensor_parallel"]["partition_config"] = family.partition_config
    config = _merged(config, passed or {})
    if "offload_optimizer" in config["zero_optimization"]:
        # AdamW is ours in either case, not DeepSpeed's own for CPUs.
        config["zero_force_ds_cpu_optimizer"] = False
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
    passed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The student's engine: gradient accumulation and clipping as the run asks for.

    With a budget of tokens DeepSpeed is told of the most passes that there can be, one for each example: what it keeps
    for several is then there. It does not count passes by it (``Student.forward``).
    """
    rows = 1 if train.micro_batch_tokens is not None else train.micro_batch_size
    return engine_config(
        zero_stage=zero_stage,
        tp_size=tp_size,
        dtype=dtype,
        family=family,
        micro_batch_size=rows,
        gradient_accumulation_steps=train.global_batch_size // (rows * dp_size),
        gradient_clipping=optim.gradient_clipping,
        passed=passed,
    )


def teacher_config(
    *, zero_stage: int, tp_size: int, dtype: str, family: Family, passed: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The configuration of an engine that is never trained.

    It has no optimizer, so stages 1 and 2 have nothing to partition: they mean 0 here, and settings of ``passed`` about
    an optimizer are left out.
    """
    passed = dict(passed or {})
    if "zero_optimization" in passed:
        passed["zero_optimization"] = {
            key: value for key, value in passed["zero_optimization"].items() if key != "offload_optimizer"
        }
    return engine_config(
        zero_stage=3 if zero_stage == 3 else 0,
        tp_size=tp_size,
        dtype=dtype,
        family=family,
        micro_batch_size=1,
        passed=passed,
    )


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings merged key by key; anything else of ``over`` wins."""
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        merged[key] = _merged(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return merged
