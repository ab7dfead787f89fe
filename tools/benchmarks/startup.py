"""How long a user waits: for --help of every verb, and for the first line and the first step of train."""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megadistill.cli.main import VERBS
from tools.benchmarks.measure import at_least, machine, save

ROOT = Path(__file__).resolve().parents[2]
FIRST_LINE, READY = "train: first line", "train: first step begins"
CPU = "train: whole run of one step, CPU time"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmark.py startup", description=__doc__)
    parser.add_argument("--rounds", type=at_least(1), default=5, help="everything once per round (default: 5)")
    parser.add_argument(
        "--against", type=Path, metavar="CLONE", help="an earlier clone, measured in turn with this one"
    )
    parser.add_argument("--output", type=Path, help="JSON file; a table goes beside it")
    parsed = parser.parse_args(arguments)
    clones = {"now": ROOT} | ({"before": parsed.against.resolve()} if parsed.against else {})
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in clones}
    with tempfile.TemporaryDirectory() as folder:
        settings = _make_assets(Path(folder))
        for round_index in range(parsed.rounds + 1):
            for name, clone in clones.items():
                for what, value in _measure(clone, Path(folder), settings).items():
                    if round_index:  # the first one warms up: caches of the disk, byte code
                        seconds[name].setdefault(what, []).append(value)
    record = {
        "command": "python tools/benchmark.py startup" + "".join(f" {word}" for word in _words(parsed)),
        "machine": machine(torch.device("cpu")),
        "rounds": parsed.rounds,
        "seconds": seconds,
    }
    table = _table(record)
    print(table)
    if parsed.output is not None:
        save(parsed.output, record, table)
    return 0


def _words(parsed: argparse.Namespace) -> list[str]:
    return ["--rounds", str(parsed.rounds), *(["--against", "CLONE"] if parsed.against else [])]


def _measure(clone: Path, folder: Path, settings: list[str]) -> dict[str, float]:
    """Wall seconds of every help text, and of one run until its first line and its first step; and CPU seconds of that
    run, which other processes on the machine change less."""
    found = {}
    for verb in VERBS:
        begun = time.perf_counter()
        subprocess.run(
            _command(verb, "--help"), env=_environment(clone), cwd=folder, check=True, stdout=subprocess.DEVNULL
        )
        found[f"{verb} --help"] = time.perf_counter() - begun
    run_dir = folder / f"run_{time.time_ns()}"
    begun, begun_at, cpu = time.perf_counter(), time.time(), _cpu_seconds()
    command = _command("train", *settings, f"run.dir={run_dir}")
    with subprocess.Popen(
        command, env=_environment(clone), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        assert run.stdout is not None
        lines = [run.stdout.readline()]
        found[FIRST_LINE] = time.perf_counter() - begun
        lines += run.stdout
    if run.returncode:
        raise SystemExit("".join(lines))
    found[CPU] = _cpu_seconds() - cpu
    # The line of a step is written when it ends.
    metrics = run_dir / "metrics.jsonl"
    step_s = json.loads(metrics.read_text(encoding="utf-8"))["time/step_s"]
    found[READY] = metrics.stat().st_mtime - step_s - begun_at
    return found


def _cpu_seconds() -> float:
    """Of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "megadistill", *words]


def _environment(clone: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"}


def _make_assets(folder: Path) -> list[str]:
    """Two small models without weights, a tokenizer and some rows; returns the arguments of a run of one step."""
    from megadistill.demo.tokenizer import train_tokenizer

    rows = [{"instruction": f"Say the number {i}.", "output": f"The number is {i}."} for i in range(64)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    train_tokenizer((row["output"] for row in rows), folder / "tokenizer", vocab_size=320)
    config = {"model_type": "llama", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    (folder / "model.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "run.yaml").write_text("data: {template: plain}\n", encoding="utf-8")
    model = str(folder / "model.json")
    return [
        *("--config", str(folder / "run.yaml")),
        *(f"model.teacher.path={model}", f"model.student.path={model}", f"model.tokenizer={folder / 'tokenizer'}"),
        *(f"data.train_path={folder / 'rows.jsonl'}", "data.max_tokens=128"),
        *(
            "data.max_prompt_tokens=64",
            "generation.max_new_tokens=4",
            "train.global_batch_size=4",
            "train.micro_batch_size=4",
            "train.max_steps=1",
        ),
    ]


def _table(record: dict[str, Any]) -> str:
    clones = list(record["seconds"])
    lines = [
        "Seconds of wall time until a verb's help is printed, and until `train` (one process, CPU, two small models) "
        f"prints its first line and begins its first step: minimum / median of {record['rounds']}.",
        "",
        f"`{record['command']}`, {record['machine']['cpu']}, {record['machine']['cores']} cores",
        "",
        "| |" + "".join(f" {name} |" for name in clones),
        "|---|" + "---|" * len(clones),
    ]
    for what in record["seconds"][clones[0]]:
        numbers = [record["seconds"][name][what] for name in clones]
        cells = "".join(f" {min(values):.2f} / {statistics.median(values):.2f} |" for values in numbers)
        lines.append(f"| {what} |{cells}")
    return "\n".join(lines)
