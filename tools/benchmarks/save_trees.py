"""What a checkpoint costs in several versions of the program, which take turns: ``benchmark.py save --tree OLD``.

Each turn is a job of its own, whose ranks import the program from its tree. A turn makes one checkpoint to warm up and
some that are measured, with a step after each begin.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).resolve().parents[2]
_TOKENS = 8  # the step is there to be disturbed, not to be long
_MEASURES = {
    "waits": "training waits, s",
    "complete": "until it is complete, s",
    "step": "step meanwhile, s",
    "cpu": "CPU time of all ranks, s",
}


def compare(trees: list[Path], ranks: list[int], rounds: int, saves: int, shape: tuple[int, int]) -> dict[str, Any]:
    """Medians of each measure, by number of ranks and tree."""
    found: dict[str, Any] = {}
    for world_size in ranks:
        numbers: list[list[dict[str, float]]] = [[] for _ in trees]
        for _ in range(rounds):
            for turn, tree in zip(numbers, trees, strict=True):
                turn += _turn(tree, world_size, saves, shape)
        found[str(world_size)] = [
            {name: statistics.median(row[name] for row in turn) for name in _MEASURES} for turn in numbers
        ]
    return found


def table(found: dict[str, Any]) -> str:
    """One line for each measure; a ratio below 1: the last tree is better than the first."""
    lines = ["| ranks | | before | now | now / before |", "|---|---|---|---|---|"]
    for world_size, (old, *_, new) in found.items():
        for name, words in _MEASURES.items():
            lines.append(
                f"| {world_size} | {words} | {old[name]:.2f} | {new[name]:.2f} | {new[name] / old[name]:.2f} |"
            )
    return "\n".join(lines)


def _turn(tree: Path, world_size: int, saves: int, shape: tuple[int, int]) -> list[dict[str, float]]:
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        workers = []
        for rank in range(world_size):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_PORT": port}
            more = {"MASTER_ADDR": "127.0.0.1", "LOCAL_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
            environment = os.environ | place | more | {"PYTHONPATH": str(tree), "DS_ACCELERATOR": "cpu"}
            words = [sys.executable, __file__, folder, str(saves), *map(str, shape)]
            workers.append(subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True))
        outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        codes = [worker.returncode for worker in workers]
        raise RuntimeError(f"the workers of {tree} ended with {codes}")
    rows: list[list[dict[str, float]]] = [json.loads(output.splitlines()[-1]) for output in outputs]
    joined = []
    for of_ranks in zip(*rows, strict=True):  # training goes on when the slowest rank does; CPU time adds up
        row = {name: max(rank[name] for rank in of_ranks) for name in ("waits", "complete", "step")}
        joined.append(row | {"cpu": sum(rank["cpu"] for rank in of_ranks)})
    return joined


def _worker(folder: Path, saves: int, hidden: int, layers: int) -> list[dict[str, float]]:
    from megadistill.checkpoint.carried import Carried
    from megadistill.checkpoint.writer import CheckpointWriter
    from megadistill.config.schema import OptimSection, TrainSection
    from megadistill.engines.student import trained_model
    from megadistill.launch.world import distributed
    from megadistill.models.loading import load_model
    from megadistill.parallel.context import ParallelContext

    tree = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": 11 * hidden // 4, "vocab_size": 32_000,
            "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 16,
            "tie_word_embeddings": False, "max_position_embeddings": 512}  # fmt: skip
    torch.set_num_threads(1)
    with distributed(600) as device:
        context = ParallelContext.build(1, 600, device)
        file = folder / f"config_{context.rank}" / "config.json"
        file.parent.mkdir()
        file.write_text(json.dumps(tree), encoding="utf-8")
        loaded = load_model(
            str(file), dtype="bf16", vocab_size=32_000, seed=0, attention="sdpa", where="student", rank=1
        )
        train = TrainSection(global_batch_size=2, micro_batch_size=2 // context.dp_size)
        student = trained_model(loaded, context, zero_stage=3, dtype="bf16", optim=OptimSection(), train=train)
        is_old = "keep_last" in inspect.signature(CheckpointWriter.__init__).parameters
        keep: dict[str, Any] = {"keep_last": 1}
        if not is_old:
            from megadistill.checkpoint.writer import Keep

            keep = {"keep": Keep(1)}
        writer = CheckpointWriter(folder, student, Carried({}, {}), context, asynchronous=True, **keep)
        return [_save(writer, student, context, number) for number in range(saves + 1)][1:]


def _forward(student: Any, tokens: torch.Tensor, objective: Any) -> torch.Tensor:
    """A pass over whole rows, by this version's interface or that of before."""
    ones, positions = torch.ones_like(tokens), torch.arange(tokens.shape[1]).expand_as(tokens)
    if "is_last" not in inspect.signature(student.forward).parameters:
        loss: torch.Tensor = student.forward(tokens, ones, positions, objective)
        return loss
    from megadistill.data.collate import SequenceBatch

    batch = SequenceBatch(tokens, ones, positions, tokens, (tokens.shape[1],) * len(tokens))
    loss = student.forward(batch, objective, is_last=True)
    return loss


def _save(writer: Any, student: Any, context: Any, number: int) -> dict[str, float]:
    tokens = torch.randint(0, 1000, (2 // context.dp_size, _TOKENS))

    def objective(hidden: torch.Tensor, head: Any) -> torch.Tensor:
        return (hidden @ head.weight.t()).float().logsumexp(-1).mean()

    context.barrier()
    begun, cpu = time.perf_counter(), time.process_time()
    writer.begin(number, {}, is_hurried=True)  # not compared with the student
    waits = time.perf_counter() - begun
    started = time.perf_counter()
    student.backward(_forward(student, tokens, objective))
    student.step(1e-5)
    step = time.perf_counter() - started
    writer.finish()
    complete = time.perf_counter() - begun
    return {"waits": waits, "complete": complete, "step": step, "cpu": time.process_time() - cpu}


def main(parsed: argparse.Namespace) -> dict[str, Any]:
    """Of ``benchmark.py save --tree``."""
    trees = [*parsed.tree, _ROOT]
    return compare(trees, [1, 2], parsed.rounds, 2, (parsed.hidden, parsed.layers))


if __name__ == "__main__":
    place, *counts = sys.argv[1:]
    print(json.dumps(_worker(Path(place), *map(int, counts))))
