"""DeepSpeed's communication backend without the operation that it compiles on CPUs."""

import deepspeed


def disable_shm_op() -> None:
    """Call before `deepspeed.init_distributed`: no C++ compiler is needed, and nothing is compiled or locked on disk.

    The operation is a shared-memory `inference_all_reduce` that ignores its group, so nothing here may use it; without
    it DeepSpeed takes the process group's all-reduce. The table is the one that DeepSpeed asks whether it can be
    built; filling it by hand also saves its probe of every compiler, about 5 s a start.
    """
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False, "deepspeed_not_implemented": False}
