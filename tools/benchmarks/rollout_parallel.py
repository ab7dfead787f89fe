"""The part of the rollout benchmark for two processes: bytes of tensor-parallel decoding, and ZeRO-3 against ZeRO-0."""

from __future__ import annotations

import os
import statistics
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from tools.benchmarks.step_workers import Sizes, model_config

if TYPE_CHECKING:
    from megadistill.decoding.protocols import Decoder
    from megadistill.decoding.rollout import RolloutState
    from megadistill.engines.student import Student

_RANKS = 2


def measure_parallel(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Both measurements, each in a separate pair of processes."""
    model_config("student", sizes).save_pretrained(folder / "student")
    found: dict[str, Any] = {"vocab": sizes.vocab, "rows": sizes.rows}
    for number, task in enumerate((_bytes, _zero)):
        context = torch.multiprocessing.get_context("spawn")
        results = context.Queue()
        ranks = [
            context.Process(target=_run, args=(rank, task, sizes, folder, f"{folder}/store{number}", results))
            for rank in range(_RANKS)
        ]
        for process in ranks:
            process.start()
        while results.empty():
            if any(process.exitcode for process in ranks):
                for process in ranks:
                    process.kill()
                raise RuntimeError(f"a rank ended with exit codes {[process.exitcode for process in ranks]}")
            time.sleep(0.2)
        found |= results.get()
        for process in ranks:
            process.join()
    return found


def _run(rank: int, task: Any, sizes: Sizes, folder: Path, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(_RANKS), "LOCAL_SIZE": str(_RANKS)}
    with (folder / f"{os.getpid()}.log").open("w", encoding="utf-8") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    from megadistill.launch.deepspeed_patches import disable_shm_op

    disable_shm_op()
    # The ranks meet at a file: nothing listens on an outside address.
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, _RANKS), rank=rank, world_size=_RANKS, timeout=timedelta(minutes=10)
    )
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    found = task(sizes, folder)
    if rank == 0:
        results.put(found)
    dist.barrier()
    dist.destroy_process_group()


def _student(sizes: Sizes, folder: Path, tp_size: int, zero_stage: int) -> Student:
    from megadistill.config.optim import OptimSection
    from megadistill.config.schema import TrainSection
    from megadistill.engines.student import trained_model
    from megadistill.models.loading import load_model
    from megadistill.parallel.context import ParallelContext

    context = ParallelContext.build(tp_size, 600, torch.device("cpu"))
    loaded = load_model(
        str(folder / "student" / "config.json"),
        dtype="fp32",
        vocab_size=sizes.vocab,
        seed=0,
        attention="sdpa",
        where="student",
    )
    return trained_model(
        loaded, context, zero_stage=zero_stage, dtype="fp32", optim=OptimSection(),
        train=TrainSection(global_batch_size=_RANKS, micro_batch_size=1),
    )  # fmt: skip


def _rollout_state(decoder: Decoder, sizes: Sizes, examples: range) -> RolloutState:
    from megadistill.data.sample import Sample
    from megadistill.decoding.rollout import RolloutState
    from megadistill.decoding.sampling import Sampling

    prompts = tuple(tuple(3 + (7 * i + j) % (sizes.vocab - 3) for j in range(sizes.prompt_tokens)) for i in examples)
    samples = [Sample(i, prompt) for i, prompt in zip(examples, prompts, strict=True)]
    limits = [sizes.new_tokens] * len(samples)
    return RolloutState(decoder, samples, limits=limits, eos_ids=frozenset(), sampling=Sampling(0), keep_hidden=True)


def _bytes(sizes: Sizes, folder: Path) -> dict[str, float]:
    """Bytes that each rank receives per example and token while two ranks decode one batch together."""
    from megadistill.decoding.sampling import Drawer

    counted = {"sampling": 0, "model": 0}
    phase = ["model"]
    distributed: Any = dist  # whose functions are replaced
    drawer: Any = Drawer
    draw, all_reduce, all_gather = drawer.__call__, dist.all_reduce, dist.all_gather

    def counting_draw(*arguments: Any, **more: Any) -> torch.Tensor:
        phase[0] = "sampling"
        try:
            return draw(*arguments, **more)
        finally:
            phase[0] = "model"

    def counting_reduce(tensor: torch.Tensor, *arguments: Any, **more: Any) -> Any:
        counted[phase[0]] += tensor.nbytes
        return all_reduce(tensor, *arguments, **more)

    def counting_gather(tensors: list[torch.Tensor], *arguments: Any, **more: Any) -> Any:
        counted[phase[0]] += sum(tensor.nbytes for tensor in tensors)
        return all_gather(tensors, *arguments, **more)

    with _student(sizes, folder, _RANKS, 0).decoder() as decoder:
        state = _rollout_state(decoder, sizes, range(sizes.rows))
        drawer.__call__ = counting_draw
        distributed.all_reduce, distributed.all_gather = counting_reduce, counting_gather
        try:
            state.write(0)
        finally:
            drawer.__call__ = draw
            distributed.all_reduce, distributed.all_gather = all_reduce, all_gather
    tokens = sizes.rows * sizes.new_tokens
    return {f"{name}_bytes": number / tokens for name, number in counted.items()}


def _zero(sizes: Sizes, folder: Path) -> dict[str, float]:
    """Rollouts on two data-parallel ranks, parameters partitioned or whole."""
    students = {stage: _student(sizes, folder, 1, stage) for stage in (0, 3)}
    rank = dist.get_rank()
    mine = range(rank * sizes.rows, (rank + 1) * sizes.rows)
    times: dict[int, list[float]] = {stage: [] for stage in students}
    gathering = []
    for number in range(sizes.rounds + 1):
        for stage, student in students.items():
            dist.barrier()
            begin = time.process_time()
            with student.decoder() as decoder:
                entered = time.process_time()
                _rollout_state(decoder, sizes, mine).write(0)
            seconds = time.process_time() - begin
            if number:
                times[stage].append(seconds)
                if stage == 3:
                    gathering.append((entered - begin) / seconds)
    ratios = [three / zero for three, zero in zip(times[3], times[0], strict=True)]
    return {"zero3_over_zero0": statistics.median(ratios), "gather_share": statistics.median(gathering)}
