"""Prepared rows (``data.cache_dir``): rate of preparing, start, and a process's own memory, beside rows in lists.

The rows are prepared by ``megadistill prepare``; each other row of the table is a process of its own. Memory is
RssAnon, what is not a page of a file.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megadistill.config.load import load_config
from megadistill.data.tokenize import load_tokenizer
from megadistill.files import write_json
from megadistill.training.data import load_training_data, make_sampler
from tools.benchmarks.loading import resident_bytes

ROOT = Path(__file__).resolve().parents[2]
TINY, PROMPT_WORDS, ANSWER_WORDS, READ_STEPS = 100, 80, 175, 100


def make_rows(file: Path, number: int, words: list[str], seed: int = 0) -> None:
    """Rows of about 300 tokens; words as frequent as Zipf's law has them."""
    rng, weights = Random(seed), [1 / (i + 2) for i in range(len(words))]
    with file.open("w", encoding="utf-8") as out:
        for _ in range(number):
            text = rng.choices(words, weights, k=PROMPT_WORDS + ANSWER_WORDS)
            prompt, answer = " ".join(text[:PROMPT_WORDS]), " ".join(text[PROMPT_WORDS:])
            out.write(json.dumps({"instruction": prompt + "?", "output": answer + "."}) + "\n")


def make_tokenizer(folder: Path) -> list[str]:
    """A byte-level BPE of 16,000 tokens, trained on the documentation and the code; returns words."""
    texts = [file.read_text(encoding="utf-8") for file in (*ROOT.rglob("*.md"), *ROOT.glob("megadistill/**/*.py"))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=16_000, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ))  # fmt: skip
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    return sorted({word for text in texts for word in text.lower().split() if word.isalpha()})


def measure(file: str, tokenizer_folder: str, cache: str) -> None:
    """Loads the rows as a run does, deals steps, and prints what that took (in a process of its own)."""
    tokenizer = load_tokenizer(tokenizer_folder)
    settings = [f"run.dir={file}.run", "model.student.path=x", "model.teacher.path=x", "train.eval_every=0",
                f"data.train_path={file}", *([f"data.cache_dir={cache}"] if cache else [])]  # fmt: skip
    config = load_config(ROOT / "configs" / "base.yaml", settings)
    memory, wall, cpu = resident_bytes()["anonymous"], time.perf_counter(), time.process_time()
    data = load_training_data(config, tokenizer, len(tokenizer))
    took = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    sampler, began = make_sampler(config, data), time.perf_counter()
    tokens = [len(s.prompt_ids) + len(s.reference_ids or ()) for i in range(READ_STEPS) for s in data.batch(sampler, i)]
    read_us = 1e6 * (time.perf_counter() - began) / len(tokens)
    print(json.dumps({
        "rows": len(data.train), **took, "own_mb": (resident_bytes()["anonymous"] - memory) / 1e6,
        "read_us_per_row": read_us, "tokens_per_row": sum(tokens) / len(tokens),
    }))  # fmt: skip


def prepare_ahead(file: Path, tokenizer: Path, cache: Path, workers: int) -> dict[str, Any]:
    """What ``megadistill prepare`` takes with some processes, its start included."""
    command = [sys.executable, "-m", "megadistill", "prepare", "--rows", str(file), "--tokenizer", str(tokenizer)]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([*command, "--cache-dir", str(cache), "--workers", str(workers)], check=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"workers": workers, "wall_s": time.perf_counter() - began, "cpu_s": cpu}


def main(arguments: list[str]) -> int:
    """The verb ``data``."""
    parser = argparse.ArgumentParser(prog="tools/benchmark.py data", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, required=True, help="where the rows go; several GB")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    tokenizer = parsed.folder / "tokenizer"
    if parsed.measure:
        measure(parsed.measure[0], str(tokenizer), parsed.measure[1])
        return 0
    parsed.folder.mkdir(parents=True, exist_ok=True)
    words, cache = make_tokenizer(tokenizer), str(parsed.folder / "cache")
    files = {number: parsed.folder / f"rows_{number}.jsonl" for number in (TINY, parsed.rows // 10, parsed.rows)}
    for number, file in files.items():
        make_rows(file, number, words)
    tiny, tenth, whole = files.values()
    cases = [("tiny", tiny, cache), ("tiny, again", tiny, cache), ("prepared", whole, cache),
             ("a tenth prepared by a run", tenth, cache), ("a tenth in lists", tenth, "")]  # fmt: skip
    results: dict[str, Any] = {"command": ["tools/benchmark.py", "data", *arguments], "cores": os.cpu_count()}
    results["prepare"] = prepare_ahead(whole, tokenizer, Path(cache), len(os.sched_getaffinity(0)))
    print("prepare", results["prepare"], flush=True)
    for name, file, where in cases:
        words_of = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "data", "--folder", str(parsed.folder)]
        done = subprocess.run([*words_of, "--measure", str(file), where], check=True, capture_output=True, text=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, results[name], flush=True)
    if parsed.out:
        write_json(parsed.out, results)
    return 0
