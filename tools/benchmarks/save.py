"""What a checkpoint costs: steps while a thread writes it, and steps that wait for it, against no checkpoint."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tools.benchmarks import save_trees
from tools.benchmarks.measure import at_least, machine, save
from tools.benchmarks.step_workers import Sizes, model_config

if TYPE_CHECKING:
    from megadistill.checkpoint.carried import Carried
    from megadistill.engines.student import Student
    from megadistill.parallel.context import ParallelContext
    from megadistill.parallel.output_head import OutputHead

_KINDS = {"none": None, "asynchronous": True, "waiting": False}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmark.py save", description=__doc__)
    parser.add_argument("--rounds", type=at_least(1), default=5, help="every kind once per round (default: 5)")
    parser.add_argument("--steps", type=at_least(1), default=3, help="steps after each checkpoint (default: 3)")
    parser.add_argument("--vocab", type=at_least(100), default=8192)
    parser.add_argument(
        "--tree", type=Path, action="append", help="an older version's clone, to compare this one with instead"
    )
    parser.add_argument("--hidden", type=at_least(16), default=1024, help="of the model of --tree (default: 1024)")
    parser.add_argument("--layers", type=at_least(1), default=18, help="of the model of --tree (default: 18)")
    parser.add_argument("--output", type=Path, help="JSON file; a table goes beside it")
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if parsed.tree:
        found = save_trees.main(parsed)
        print(save_trees.table(found))
        if parsed.output is not None:
            save(parsed.output, found, save_trees.table(found))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        found = _measure(Path(folder), parsed.rounds, parsed.steps, parsed.vocab)
    table = _table(found)
    print(table)
    if parsed.output is not None:
        save(parsed.output, found, table)
    return 0


def _measure(folder: Path, rounds: int, steps: int, vocab: int) -> dict[str, Any]:
    from megadistill.checkpoint.carried import carried_files
    from megadistill.data.tokenize import load_tokenizer
    from megadistill.demo.tokenizer import train_tokenizer
    from megadistill.launch.world import distributed
    from megadistill.parallel.context import ParallelContext

    sizes = Sizes(vocab, rows=8, prompt_tokens=64, new_tokens=64, rounds=rounds)
    with distributed(600) as device:
        context = ParallelContext.build(1, 600, device)
        student = _student(folder, sizes, context)
        train_tokenizer(["a few words for a small tokenizer"] * 50, folder / "tokenizer", vocab_size=300)
        path = str(folder / "tokenizer")
        tokenizer = load_tokenizer(path)
        ends = frozenset({tokenizer.eos_token_id})
        carried = carried_files(str(folder / "model"), path, tokenizer, ends, student.loaded.config)
        numbers = sum(torch.Size(spec.shape).numel() for spec in student.shard_specs.values())
        seconds: dict[str, list[float]] = {kind: [] for kind in _KINDS}
        blocked: dict[str, list[float]] = {kind: [] for kind in _KINDS}
        for round_index in range(rounds + 1):
            for kind, asynchronous in _KINDS.items():
                total, waiting = _steps(student, carried, folder / kind, context, steps, asynchronous)
                if round_index:  # the first one warms up
                    seconds[kind].append(total)
                    blocked[kind].append(waiting)
    step_s = statistics.median(seconds["none"]) / steps
    rows = {
        kind: {
            "seconds": seconds[kind],
            "blocked_s": statistics.median(blocked[kind]),
            "share_of_a_step": (statistics.median(seconds[kind]) - statistics.median(seconds["none"])) / step_s,
            "blocked_share_of_a_step": statistics.median(blocked[kind]) / step_s,
        }
        for kind in _KINDS
    }
    return {
        "command": "python " + " ".join(sys.argv),
        "machine": machine(torch.device("cpu")),
        "parameters": numbers,
        "step_s": step_s,
        "steps": steps,
        "kinds": rows,
    }


def _student(folder: Path, sizes: Sizes, context: ParallelContext) -> Student:
    from megadistill.config.optim import OptimSection
    from megadistill.config.schema import TrainSection
    from megadistill.engines.student import trained_model
    from megadistill.models.loading import load_model

    model_config("student", sizes).save_pretrained(folder / "model")
    loaded = load_model(
        str(folder / "model" / "config.json"),
        dtype="fp32",
        vocab_size=sizes.vocab,
        seed=0,
        attention="sdpa",
        where="student",
    )
    train = TrainSection(global_batch_size=16, micro_batch_size=16)
    return trained_model(loaded, context, zero_stage=3, dtype="fp32", optim=OptimSection(), train=train)


def _steps(
    student: Student, carried: Carried, folder: Path, context: ParallelContext, steps: int, asynchronous: bool | None
) -> tuple[float, float]:
    """Wall seconds of a checkpoint and some steps after it, and how many of them training waited."""
    from megadistill.checkpoint.writer import CheckpointWriter, Keep
    from megadistill.data.collate import right_padded

    writer = CheckpointWriter(folder, student, carried, context, keep=Keep(1), asynchronous=bool(asynchronous))
    if asynchronous is not None:  # a run waits for its first checkpoint, which is compared with the student
        writer.begin(0, {})
        writer.finish()
    tokens = torch.randint(0, 1000, (16, 256), generator=torch.Generator().manual_seed(0))
    batch = right_padded([(row, None) for row in tokens.tolist()], 0)
    begun, waiting = time.perf_counter(), 0.0
    for step in range(steps):
        if step == 0 and asynchronous is not None:
            started = time.perf_counter()
            writer.begin(1, {})
            waiting += time.perf_counter() - started
        student.backward(student.forward(batch, _cross_entropy(tokens), is_last=True))
        student.step(1e-4)
        started = time.perf_counter()
        writer.advance(writer.status)
        waiting += time.perf_counter() - started
    total = time.perf_counter() - begun
    writer.finish()
    return total, waiting


def _cross_entropy(tokens: torch.Tensor) -> Callable[[torch.Tensor, OutputHead], torch.Tensor]:
    def objective(hidden: torch.Tensor, head: OutputHead) -> torch.Tensor:
        logits = torch.nn.functional.linear(hidden, head.weight, head.bias).flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, tokens.flatten())

    return objective


def _table(found: dict[str, Any]) -> str:
    lines = [
        f"Checkpoint of {found['parameters'] / 1e6:.1f}M parameters (float32, AdamW, ZeRO-3, one process, one thread), "
        f"then {found['steps']} steps of {found['step_s']:.2f} s.",
        "",
        f"`{found['command']}`, {found['machine']['cpu']}, {found['machine']['cores']} cores",
        "",
        "| | training waits, s | of a step | total cost of the steps after it, of a step |",
        "|---|---|---|---|",
    ]
    for kind, row in found["kinds"].items():
        lines.append(
            f"| {kind} | {row['blocked_s']:.2f} | {row['blocked_share_of_a_step']:.1%} | {row['share_of_a_step']:.1%} |"
        )
    return "\n".join(lines)
