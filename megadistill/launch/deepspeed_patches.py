"""Patches of what DeepSpeed does at its start and its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
from deepspeed.runtime import bf16_optimizer, compiler
from deepspeed.runtime.zero import utils as zero_utils


def disable_shm_op() -> None:
    """Keeps DeepSpeed from compiling its shared-memory operation. Call it before ``deepspeed.init_distributed``.

    The operation is an ``inference_all_reduce`` that ignores its group, so nothing here may use it; without it
    DeepSpeed takes the process group's all-reduce. DeepSpeed asks this table whether the operation can be built;
    filling it by hand also saves the probe of every compiler, about 5 s a start.
    """
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False, "deepspeed_not_implemented": False}


def skip_muon_compilation() -> None:
    """Keeps DeepSpeed from compiling the Muon optimizer. Call it before ``deepspeed.initialize``.

    Under ZeRO it imports Muon for its class alone, but decorating three of its functions with ``torch.compile`` imports
    all of torch's compiler, a second or two a start.
    """

    def compile_nothing() -> Callable[[Any], Any]:
        return lambda function: function

    compiler.compile = compile_nothing


def skip_memory_reports() -> None:
    """Keeps an optimizer of DeepSpeed's (ZeRO-1, bfloat16) from printing memory use and resetting its peak."""
    bf16_optimizer.see_memory_usage = lambda *_, **__: None


@contextmanager
def trust_other_ranks() -> Iterator[None]:
    """Lets DeepSpeed take for granted that all ranks hold the same lists, for a dry run, which has no other ranks.

    ZeRO-3 asserts it by asking rank 0.
    """

    def own_list(numbers: list[int]) -> list[int]:
        return numbers

    def any_length(numbers: list[int]) -> None:
        pass

    theirs = zero_utils.get_lst_from_rank0, zero_utils.assert_lst_len_same_as_other_ranks
    zero_utils.get_lst_from_rank0, zero_utils.assert_lst_len_same_as_other_ranks = own_list, any_length
    try:
        yield
    finally:
        zero_utils.get_lst_from_rank0, zero_utils.assert_lst_len_same_as_other_ranks = theirs


def destroy_process_groups() -> None:
    """Destroys every process group, DeepSpeed's too, and makes DeepSpeed forget them.

    Its module globals would hand the dead groups to the next run of this process.
    """
    deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None
