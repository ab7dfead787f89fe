"""Memory of processes on CPUs: what large tensors held goes back, and a step holds what the planner says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megadistill.config.schema import RunConfig
from megadistill.planning.case import Case, Models
from megadistill.planning.counted_step import Lengths, measured_step, plannable, vocabulary
from megadistill.planning.dry_run import dry_run
from megadistill.planning.formulas import step_use
from megadistill.planning.search import step_bytes
from megadistill.planning.storage import PROCESS_BYTES
from tests.support.planning import forked
from tests.support.preload import preload
from tests.support.runs import join_deepspeed
from tests.support.spawn import run_fresh, run_ranks
from tools.benchmarks.loading import load_and_measure, peak_memory, resident_bytes, write_checkpoint

LENGTHS = Lengths(16, 16)


def _kept(is_set: bool) -> float:
    """Bytes that a process keeps of tensors that it has freed."""
    from megadistill.launch.world import return_freed_memory

    if is_set:
        return_freed_memory()
    first = torch.ones(7_500_000)
    del first  # glibc would take tensors of up to 30 MB from its heap from now on
    before = resident_bytes()["anonymous"]
    freed = [torch.ones(2_000_000) for _ in range(20)]
    lid = torch.ones(2_500_000)
    del freed
    return resident_bytes()["anonymous"] - before - lid.nbytes


@pytest.mark.parametrize(("is_set", "is_kept"), [(True, False), (False, True)])
def test_freed_memory_goes_back(monkeypatch: pytest.MonkeyPatch, is_set: bool, is_kept: bool) -> None:
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    assert (run_fresh(_kept, is_set) > 100e6) == is_kept


def _config(folder: Path) -> RunConfig:
    tree: dict[str, Any] = {
        "run": {"dir": "unused"},
        "model": {role: {"path": str(folder / role), "dtype": "bf16"} for role in ("teacher", "student")},
        "parallel": {"tp_size": 2, "zero_stage": 3},
        "data": {"train_path": "unused", "max_prompt_tokens": LENGTHS.prompt, "max_tokens": 32},
        "generation": {"max_new_tokens": LENGTHS.response},
        "train": {"global_batch_size": 4, "micro_batch_size": 2},
    }
    return RunConfig.model_validate(tree)


def _peak(rank: int, folder: Path) -> float:
    """Highest anonymous bytes of three steps and the loading before them, above those of the libraries."""
    from megadistill.launch.world import return_freed_memory
    from megadistill.parallel.context import ParallelContext

    return_freed_memory()
    join_deepspeed(rank)
    config, _ = plannable(_config(folder))
    context = ParallelContext.build(2, 300, torch.device("cpu"))
    load_and_measure(context, folder / "small", "bf16", "teacher", "map")  # what libraries load late
    with peak_memory() as peak:
        measured_step(config, context, LENGTHS, vocab_size=vocabulary(config))
    return peak["anonymous"]


def test_a_process_holds_what_the_planner_says(tmp_path: Path) -> None:
    """A run like that of ``tools/benchmark.py memory``, smaller: dry run and formulas within a tenth."""
    preload()
    write_checkpoint(tmp_path / "small", torch.bfloat16, 64, 1, 64)
    write_checkpoint(tmp_path / "teacher", torch.bfloat16, 768, 4, 16_000)
    write_checkpoint(tmp_path / "student", torch.bfloat16, 512, 8, 16_000)
    config = _config(tmp_path)
    case = Case.of(config, Models.of(config), nodes=1, gpus_per_node=2, gpu_memory=2**34, like_gpu=False)
    exact = forked(_dry_run, config)
    for measured in run_ranks(_peak, 2, tmp_path, timeout_s=900):
        for use in (exact, step_use(case)):
            planned = step_bytes(case, use) - PROCESS_BYTES
            assert measured == pytest.approx(planned, rel=0.1), (measured, planned, use.source)


def _dry_run(config: RunConfig) -> Any:
    return dry_run(
        config, rank=0, world_size=2, like_gpu=False, gpu_memory=0, prompt_tokens=LENGTHS.prompt,
        response_tokens=LENGTHS.response,
    )  # fmt: skip
