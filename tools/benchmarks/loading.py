"""Host memory and bytes read while a model is loaded and partitioned: layouts x types."""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tools.benchmarks.measure import at_least, machine, save, trim

ROOT = Path(__file__).resolve().parents[2]
FILE_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TYPES = (("bf16", "bf16"), ("fp16", "bf16"), ("fp32", "fp32"))  # of the files, of the run
LAYOUTS = ((1, 1), (2, 1), (4, 1), (2, 2))
_FILE_BYTES = 500_000_000


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmark.py loading", description=__doc__)
    parser.add_argument("--hidden", type=at_least(64), default=1536, help="hidden size (default: 1536: 0.78e9 weights)")
    parser.add_argument("--layers", type=at_least(1), default=24, help="layers (default: 24)")
    parser.add_argument("--vocab", type=at_least(64), default=32_000, help="vocabulary (default: 32000)")
    parser.add_argument("--role", choices=("teacher", "student"), default="teacher", help="which engine is made")
    parser.add_argument("--read", choices=("map", "copy"), default="map", help="model.read")
    parser.add_argument("--output", type=Path, help="JSON file; a table goes beside it")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.worker is not None:
        print(json.dumps(_work(**json.loads(parsed.worker))), flush=True)
        return 0
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for files, run in TYPES:
            folder = Path(scratch) / files
            write_checkpoint(folder, FILE_TYPES[files], parsed.hidden, parsed.layers, parsed.vocab)
            for tp_size, dp_size in LAYOUTS:
                ranks = _launch(folder, tp_size, dp_size, run, parsed)
                rows.append({"files": files, "run": run, "tp": tp_size, "dp": dp_size, "ranks": ranks})
                print(_row(rows[-1]), flush=True)
            for file in folder.iterdir():
                file.unlink()
    words = [f"--{name} {getattr(parsed, name)}" for name in ("hidden", "layers", "vocab", "role", "read")]
    command = " ".join(["python tools/benchmark.py loading", *words])
    record = {"command": command, "machine": machine(torch.device("cpu")), "rows": rows}
    table = _table(record)
    if parsed.output is not None:
        save(parsed.output, record, table)
    return 0


def write_checkpoint(folder: Path, dtype: torch.dtype, hidden: int, layers: int, vocab: int) -> None:
    """A Llama folder with contents that are cheap to make."""
    from transformers import LlamaConfig

    heads = max(4, hidden // 128)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=2048, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, dtype=dtype,
    )  # fmt: skip
    write_weights(folder, config)


def write_weights(folder: Path, config: Any) -> None:
    """A folder of a Llama configuration and its type, one file of at most 500 MB in memory at a time."""
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    dtype: torch.dtype = config.dtype
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in LlamaForCausalLM(config).named_parameters()}
    groups: list[dict[str, torch.Size]] = [{}]
    for name, shape in shapes.items():
        if sum(each.numel() for each in (*groups[-1].values(), shape)) * dtype.itemsize > _FILE_BYTES and groups[-1]:
            groups.append({})
        groups[-1][name] = shape
    block = torch.arange(1 << 16).mul(0.618).frac().sub(0.5).mul(0.04).to(dtype)
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups):
        file = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        weight_map |= dict.fromkeys(group, file)
        tensors = {}
        for name, shape in group.items():
            tensors[name] = block.repeat(-(-shape.numel() // len(block)))[: shape.numel()].view(shape).clone()
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """Samples this process's memory; the result has ``anonymous`` and ``mapped``: highest bytes above the start."""
    peak = {"anonymous": 0.0, "mapped": 0.0}
    gc.collect()
    trim()
    base, done = resident_bytes(), threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            now = resident_bytes()
            for kind in peak:
                peak[kind] = max(peak[kind], now[kind] - base[kind])

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def resident_bytes() -> dict[str, float]:
    """Bytes of this process that are ``anonymous`` or ``mapped`` from files."""
    kinds = {"RssAnon": "anonymous", "RssFile": "mapped"}
    with open("/proc/self/status", encoding="ascii") as status:
        lines = (line.split() for line in status)
        return {kinds[words[0][:-1]]: int(words[1]) * 1024.0 for words in lines if words[0][:-1] in kinds}


def load_and_measure(context: Any, folder: Path, dtype: str, role: str, read: Any) -> dict[str, float]:
    """What one rank needs to load a folder and make its engine (collective over the world).

    Returns:
        Bytes: ``anonymous`` and ``mapped`` (peaks), ``read`` (of files), ``kept`` (weights after ZeRO-3), ``shard`` (of
        tensor parallelism, in the run's type), ``shard_in_files`` (the same in the type of the files), ``largest``
        (tensor, in the type of the files); and ``seconds``.
    """
    from megadistill.config.schema import OptimSection, TrainSection
    from megadistill.engines.partitioned import frozen_model
    from megadistill.engines.student import trained_model
    from megadistill.engines.zero_parameter import partitioned_ones
    from megadistill.models.loading import load_model_on_ranks
    from megadistill.parallel.node import Node

    begun = time.perf_counter()
    with peak_memory() as peak:
        node = Node.build(context, has_group=read == "copy")
        vocab = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        loaded = load_model_on_ranks(
            str(folder), node, dtype=dtype, vocab_size=vocab, seed=0, attention="sdpa", where="model", read=read
        )
        reader: Any = loaded.weights
        if role == "teacher":
            model = frozen_model(loaded, context, zero_stage=3, dtype=dtype, cpu_products="packed")
        else:
            train = TrainSection(global_batch_size=context.dp_size, micro_batch_size=1)
            model = trained_model(
                loaded, context, zero_stage=3, dtype=dtype, optim=OptimSection(), train=train, cpu_products="packed"
            )
    stored = reader._tensors.values()
    numel = sum(torch.Size(spec.shard_shape(context.tp_rank)).numel() for spec in model.shard_specs.values())
    kept = sum(p.ds_tensor.nbytes for p in partitioned_ones(model.module.parameters()))
    in_files = next(iter(stored)).dtype.itemsize
    return {
        **peak, "read": reader.bytes_read, "kept": kept, "shard_in_files": numel * in_files,
        "shard": numel * next(model.module.parameters()).element_size(),
        "largest": max(each.nbytes for each in stored), "seconds": time.perf_counter() - begun,
    }  # fmt: skip


def _work(folder: str, tp_size: int, dtype: str, role: str, read: str) -> dict[str, float]:
    torch.set_num_threads(1)
    from megadistill.launch.world import distributed
    from megadistill.parallel.context import ParallelContext

    with distributed(600) as device:
        context = ParallelContext.build(tp_size, 600, device)
        with tempfile.TemporaryDirectory() as scratch:  # once in small: what libraries load late is no model's memory
            write_checkpoint(Path(scratch), torch.float32, 64, 1, 64)
            load_and_measure(context, Path(scratch), dtype, role, read)
        return load_and_measure(context, Path(folder), dtype, role, read)


def _launch(folder: Path, tp_size: int, dp_size: int, dtype: str, parsed: argparse.Namespace) -> list[dict[str, float]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    given = {"folder": str(folder), "tp_size": tp_size, "dtype": dtype, "role": parsed.role, "read": parsed.read}
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "loading", "--worker", json.dumps(given)]
    world = {"WORLD_SIZE": str(tp_size * dp_size), "LOCAL_SIZE": str(tp_size * dp_size), "OMP_NUM_THREADS": "1"}
    common = {**os.environ, **world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "HF_HUB_OFFLINE": "1"}
    workers = [
        subprocess.Popen(
            command, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(tp_size * dp_size)
    ]
    printed = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise SystemExit(f"a rank failed: {[worker.returncode for worker in workers]}")
    return [json.loads(text.strip().splitlines()[-1]) for text in printed]


def _row(row: dict[str, Any]) -> str:
    worst = {key: max(rank[key] for rank in row["ranks"]) / 1e6 for key in row["ranks"][0]}
    read = sum(rank["read"] for rank in row["ranks"]) / 1e6
    return (
        f"| {row['files']} -> {row['run']} | {row['tp']} x {row['dp']} | {worst['anonymous']:.0f} | "
        f"{worst['shard'] + 2 * worst['largest']:.0f} | {worst['shard']:.0f} | {worst['kept']:.0f} | "
        f"{worst['mapped']:.0f} | {worst['read']:.0f} | {read:.0f} | {worst['seconds'] * 1e6:.0f} |"
    )


def _table(record: dict[str, Any]) -> str:
    return "\n".join(
        [
            "MB of the rank that has most: anonymous memory above that of the imports, at its peak while the files are "
            "opened, the model is partitioned by ZeRO-3, and its weights are filled in.",
            "",
            f"`{record['command']}`, {record['machine']}",
            "",
            "| files -> run | tp x dp | peak | slice + 2 largest tensors | slice of tp | kept | mapped at peak | "
            "read | read by all | s |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *(_row(row) for row in record["rows"]),
        ]
    )
