"""The ``deepspeed`` section: what is passed through to DeepSpeed's own configuration, and what this project decides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

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
    "data_types": "model.student.dtype and model.teacher.dtype",
    "tensor_parallel": "parallel.tp_size",
    "activation_checkpointing": "model.gradient_checkpointing",
    "checkpoint": "checkpoint.*",
    "steps_per_print": "train.log_every",
    "tensorboard": "nothing: events are in run.dir",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "nothing: checkpoints hold standard weights",
}
# What may be passed. DeepSpeed ignores a top-level key that it does not know, so the list is closed.
PASSED = (
    "zero_optimization",
    "aio",
    "comms_logger",
    "communication_data_type",
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


def _keys(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{name}.")
