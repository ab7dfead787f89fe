"""The ``deepspeed`` section: what is passed through to DeepSpeed's own configuration, and what this project decides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_ZERO = "zero_optimization."
# DeepSpeed's key in zero_optimization -> ours in parallel.zero.
ZERO_KEYS = {
    "overlap_comm": "overlap_comm",
    "reduce_bucket_size": "reduce_bucket_size",
    "stage3_prefetch_bucket_size": "prefetch_bucket_size",
    "stage3_param_persistence_threshold": "param_persistence_threshold",
    "stage3_max_live_parameters": "max_live_parameters",
    "stage3_max_reuse_distance": "max_reuse_distance",
}
# DeepSpeed's key -> the key of this project that decides it.
OWNED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "optim.gradient_clipping",
    "optimizer": "optim.*",
    "scheduler": "optim.schedule",
    "zero_allow_untested_optimizer": "nothing: the optimizer is always AdamW (optim.*)",
    "zero_force_ds_cpu_optimizer": "nothing: the optimizer is always AdamW (optim.*)",
    "bf16": "model.student.dtype and model.teacher.dtype",
    "fp16": "model.student.dtype and model.teacher.dtype",
    "amp": "model.student.dtype and model.teacher.dtype",
    "torch_autocast": "model.student.dtype and model.teacher.dtype",
    "data_types": "model.student.dtype, model.teacher.dtype and optim.gradient_dtype",
    "communication_data_type": "optim.gradient_dtype",
    "tensor_parallel": "parallel.tp_size",
    "activation_checkpointing": "model.gradient_checkpointing",
    "checkpoint": "checkpoint.*",
    "steps_per_print": "train.log_every",
    "tensorboard": "nothing: events are in run.dir",
    f"{_ZERO}stage": "parallel.zero_stage",
    f"{_ZERO}stage3_gather_16bit_weights_on_model_save": "nothing: checkpoints hold standard weights",
    f"{_ZERO}offload_optimizer": "parallel.offload",
    f"{_ZERO}zero_hpz_partition_size": "parallel.zero.hpz_partition_size",
    **{f"{_ZERO}{theirs}": f"parallel.zero.{ours}" for theirs, ours in ZERO_KEYS.items()},
    **{f"{_ZERO}{ours}": f"parallel.zero.{ours}" for ours in ZERO_KEYS.values()},  # DeepSpeed takes these names, too
}
# What may be passed. DeepSpeed ignores a top-level key that it does not know, so the list is closed.
PASSED = (
    "zero_optimization",
    "aio",
    "comms_logger",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "seq_parallel_communication_data_type",
    "wall_clock_breakdown",
)


def owned_key(settings: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first of DeepSpeed's keys in ``settings`` that this project decides, and the key to use instead."""
    return next(((key, OWNED[key]) for key in _keys(settings) if key in OWNED), None)


def unknown_key(settings: Mapping[str, Any]) -> str | None:
    """The first top-level key that is not passed on."""
    return next((key for key in settings if key not in PASSED), None)


def moved(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run of an earlier version, whose section ``deepspeed`` may hold what other keys decide now.

    Buckets, communication and offloading are not part of what a run computes, so values that have no counterpart are
    left out.
    """
    passed = dict(tree.get("deepspeed") or {})
    passed.pop("communication_data_type", None)
    zero = dict(passed.pop("zero_optimization", None) or {})
    parallel = dict(tree.get("parallel") or {})
    for theirs, ours in ZERO_KEYS.items():
        values = [zero.pop(name) for name in (theirs, ours) if name in zero]
        if values and parallel.get("zero_stage", 3) == 3:
            parallel["zero"] = {**parallel.get("zero", {}), ours: values[0]}
    if (zero.pop("offload_optimizer", None) or {}).get("device") == "cpu":
        parallel["offload"] = "optimizer"
    passed |= {"zero_optimization": zero} if zero else {}
    return {**tree, "parallel": parallel, "deepspeed": passed}


def _keys(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{name}.")
