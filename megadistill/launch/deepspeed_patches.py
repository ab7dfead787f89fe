"""What DeepSpeed does at its start and end that a run here does not need, or needs done otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
from deepspeed.runtime import compiler


def disable_shm_op() -> None:
    """Call before `deepspeed.init_distributed`: no C++ compiler is needed, and nothing is compiled or locked on disk.

    The operation is a shared-memory `inference_all_reduce` that ignores its group, so nothing here may use it; without
    it DeepSpeed takes the process group's all-reduce. The table is the one that DeepSpeed asks whether it can be
    built; filling it by hand also saves its probe of every compiler, about 5 s a start.
    """
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False, "deepspeed_not_implemented": False}


def skip_muon_compilation() -> None:
    """Call before `deepspeed.initialize`, which imports the Muon optimizer under ZeRO for its class alone: decorating
    three of its functions with `torch.compile` imports all of torch's compiler, a second or two a start."""

    def compile_nothing() -> Callable[[Any], Any]:
        return lambda function: function

    compiler.compile = compile_nothing


def destroy_process_groups() -> None:
    """Destroys every process group, DeepSpeed's own too, and makes it forget them: its module globals would hand the
    dead ones to the next run of this process."""
    deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None
