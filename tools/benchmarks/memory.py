"""Host memory of a run of ``train`` on CPU processes at tp 2 x ZeRO-3, beside what ``megadistill plan --cpu`` says."""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tools.benchmarks.loading import ROOT, write_weights
from tools.benchmarks.measure import at_least, machine, save

if TYPE_CHECKING:
    from megadistill.planning.use import StepUse

# TinyLlama 1.1B, and a student of its shape with a tied head. Hidden size, heads, intermediate size.
TEACHER, STUDENT = (2048, 32, 5632), (1024, 16, 2816)
KV_HEADS, VOCABULARY = 4, 32_000
PROMPT, RESPONSE = 24, 32
RANKS = 2


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmark.py memory", description=__doc__)
    parser.add_argument("--teacher-layers", type=at_least(1), default=22, help="default: 22, 1.10e9 weights")
    parser.add_argument("--student-layers", type=at_least(1), default=22, help="default: 22, 0.28e9 weights")
    parser.add_argument("--steps", type=at_least(2), default=3, help="steps of training (default: 3)")
    parser.add_argument("--output", type=Path, help="JSON file; a table goes beside it")
    parsed = parser.parse_args(arguments)
    layers = parsed.teacher_layers, parsed.student_layers
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config_file = _write_run(folder, layers, parsed.steps)
        ranks = _train(config_file, folder / "run", parsed.steps)
        planned = _plan(config_file)
    command = f"python tools/benchmark.py memory --teacher-layers {layers[0]} --student-layers {layers[1]}"
    record = {
        "command": f"{command} --steps {parsed.steps}", "machine": machine(torch.device("cpu")), "ranks": ranks,
        "planned": planned,
    }  # fmt: skip
    table = _table(record)
    print(table)
    if parsed.output is not None:
        save(parsed.output, record, table)
    return 0


def _write_run(folder: Path, layers: tuple[int, int], steps: int) -> Path:
    """Models, a tokenizer of as many words as they have rows, and texts of the planned lengths."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    for role, (hidden, heads, intermediate), number in zip(
        ("teacher", "student"), (TEACHER, STUDENT), layers, strict=True
    ):
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=number,
            num_attention_heads=heads, num_key_value_heads=KV_HEADS, max_position_embeddings=2048,
            tie_word_embeddings=role == "student", bos_token_id=1, eos_token_id=2, dtype=torch.bfloat16,
        )  # fmt: skip
        write_weights(folder / role, config)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer")
    generator = random.Random(0)

    def text(tokens: int) -> str:
        return " ".join(f"w{generator.randrange(3, VOCABULARY)}" for _ in range(tokens))

    rows = [{"instruction": text(PROMPT), "input": "", "output": text(RESPONSE - 1)} for _ in range(64)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tree = {
        "run": {"dir": str(folder / "run")},
        "model": {
            "teacher": {"path": str(folder / "teacher"), "dtype": "bf16"},
            "student": {"path": str(folder / "student"), "dtype": "bf16"},
            "tokenizer": str(folder / "tokenizer"),
        },
        "data": {"train_path": str(folder / "train.jsonl"), "template": "plain", "max_prompt_tokens": PROMPT,
                 "max_tokens": PROMPT + RESPONSE},
        "generation": {"mode": "on_policy", "max_new_tokens": RESPONSE},
        "parallel": {"tp_size": RANKS, "zero_stage": 3},
        "train": {"max_steps": steps, "global_batch_size": 4, "micro_batch_size": 2},
    }  # fmt: skip
    file = folder / "run.yaml"
    file.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    return file


def _train(config_file: Path, run_dir: Path, steps: int) -> list[dict[str, int]]:
    """Trains; for each rank the highest bytes: ``steps`` of resident memory from the start to the last step, and
    ``saving`` of anonymous memory afterwards, when mapped files come and go."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    world = {"WORLD_SIZE": str(RANKS), "LOCAL_SIZE": str(RANKS), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    common = {**os.environ, **world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "megadistill", "train", "--config", str(config_file)]
    workers = [
        subprocess.Popen(command, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(RANKS)
    ]
    peaks = [{"steps": 0, "saving": 0} for _ in workers]
    metrics = run_dir / "metrics.jsonl"
    while any(worker.poll() is None for worker in workers):
        is_done = metrics.is_file() and metrics.read_bytes().count(b"\n") >= steps
        for worker, peak in zip(workers, peaks, strict=True):
            found = _status(worker.pid)
            if is_done:
                peak["saving"] = max(peak["saving"], found.get("RssAnon", 0))
            else:
                peak["steps"] = max(peak["steps"], found.get("VmHWM", 0))
        time.sleep(0.02)
    if any(worker.returncode for worker in workers):
        raise SystemExit(f"a rank failed: {[worker.returncode for worker in workers]}")
    return peaks


def _status(pid: int) -> dict[str, int]:
    """Bytes of a process by kind; empty once it has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    words = (line.split() for line in lines)
    return {word[0][:-1]: int(word[1]) * 1024 for word in words if word[0] in ("VmHWM:", "RssAnon:")}


def _plan(config_file: Path) -> dict[str, dict[str, int]]:
    """By formulas and by a dry run: bytes of a step and of all that a process does."""
    from megadistill.config.load import load_config
    from megadistill.planning.case import Case, Models
    from megadistill.planning.dry_run import dry_run_in_process
    from megadistill.planning.formulas import step_use
    from megadistill.planning.gpus import total_memory
    from megadistill.planning.search import needed_bytes, step_bytes

    config = load_config(config_file, [])
    memory = total_memory() // RANKS
    case = Case.of(config, Models.of(config), nodes=1, gpus_per_node=RANKS, gpu_memory=memory, like_gpu=False)
    exact = dry_run_in_process(
        case.config, rank=0, world_size=RANKS, like_gpu=False, gpu_memory=memory, prompt_tokens=PROMPT,
        response_tokens=RESPONSE,
    )  # fmt: skip

    def told(use: StepUse) -> dict[str, int]:
        return {"peak": use.peak, "steps": step_bytes(case, use), "needed": needed_bytes(case, use)}

    return {"formulas": told(step_use(case)), "exact": told(exact)}


def _table(record: dict[str, Any]) -> str:
    exact, formulas = record["planned"]["exact"], record["planned"]["formulas"]
    rows = [
        f"| {rank} | {peak['steps'] / 1e9:.2f} | {exact['steps'] / 1e9:.2f} | "
        f"{100 * (peak['steps'] / exact['steps'] - 1):+.1f} % | {formulas['steps'] / 1e9:.2f} | "
        f"{peak['saving'] / 1e9:.2f} | {exact['needed'] / 1e9:.2f} |"
        for rank, peak in enumerate(record["ranks"])
    ]
    return "\n".join(
        [
            "GB of each process. Steps: resident memory, libraries included, at its highest from the start to the end "
            "of the last step. Saving: anonymous memory afterwards.",
            "",
            f"`{record['command']}`, {record['machine']}",
            "",
            "| rank | steps | plan --exact | measured over planned | by formulas | saving | needed, by the plan |",
            "|---|---|---|---|---|---|---|",
            *rows,
        ]
    )
