"""Whose memory is it: the code that allocates a storage names its owner.

The innermost function on the stack that the table knows decides. What stays between steps is named by what it is
(``Counter.own``), because weights are allocated in many places.
"""

from __future__ import annotations

from types import FrameType

TEACHER, STUDENT, OPTIMIZER = "teacher weights", "student weights", "optimizer states"
SECONDARY = "secondary weights"
GRADIENTS, BUCKET, GATHERED = "gradients", "reduce bucket", "gathered parameters"
CACHE, ACTIVATIONS, LOSS, OTHER = "kv cache", "activations", "loss", "other"
OWNERS = (TEACHER, STUDENT, SECONDARY, OPTIMIZER, GRADIENTS, BUCKET, GATHERED, CACHE, ACTIVATIONS, LOSS, OTHER)

# Module -> owner, or (function -> owner) with "" for its other functions. Names only: no library is imported for them.
_TABLE: dict[str, str | dict[str, str]] = {
    "megadistill.decoding.kv_cache": CACHE,
    "megadistill.decoding.hf_cache": CACHE,
    "megadistill.losses": LOSS,
    "megadistill.engines.gathered": GATHERED,
    "deepspeed.runtime.zero.partition_parameters": {"_partition_param_sec": SECONDARY, "": GATHERED},
    "deepspeed.runtime.zero.partitioned_param_coordinator": GATHERED,
    "deepspeed.runtime.zero.stage3": {"_setup_for_real_optimizer": BUCKET, "": GRADIENTS},
    "deepspeed.runtime.zero.stage_1_and_2": {"setup_buckets": BUCKET, "": GRADIENTS},
    "deepspeed.runtime.bf16_optimizer": GRADIENTS,
    "deepspeed.runtime.engine": {"_reduce_non_expert_gradients": BUCKET},
    "torch.optim": OPTIMIZER,
}
_PACKAGES = ("megadistill.losses", "torch.optim")  # their modules are one entry of the table


def owner_of_frame(frame: FrameType | None) -> str:
    """The owner of what code below ``frame`` allocates."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        entry = _TABLE.get(module)
        if entry is None:
            entry = next((_TABLE[p] for p in _PACKAGES if module.startswith(p + ".")), None)
        if isinstance(entry, str):
            return entry
        if entry is not None:
            owner = entry.get(frame.f_code.co_name, entry.get(""))
            if owner is not None:
                return owner
        frame = frame.f_back
    return ACTIVATIONS
