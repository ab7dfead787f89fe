"""Decoding against transformers' generate and the bare matrix products.

Also re-generation after corrections against a rollout, the bytes that tensor-parallel decoding exchanges, and ZeRO-3
against ZeRO-0.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megadistill.errors import ConfigError
from tools.benchmarks.measure import at_least, clock, find_device, machine, save
from tools.benchmarks.operations import TokenOperations, token_operations
from tools.benchmarks.rollout_parallel import measure_parallel
from tools.benchmarks.rollout_vllm import VllmRollout
from tools.benchmarks.step_workers import MODELS, Sizes, model_config, num_parameters

_LEGEND = """\
A student of {parameters:.1f}M parameters, {dtype}, {prompt} + {new} tokens per example, sampled at temperature 1; no
response ends early. One process, one thread, {clock}; in each round everything runs once, after one that does not
count. ms: median. Rollout over generate: median over the rounds of generate's time over the line's in the same round
(more is faster). Of a rollout: the line's time over megadistill's rollout in the same round. Products: those of the
decoded tokens alone, by torch's linear calls, without prompts, attention, norms or sampling. Re-generation: every
response has a correction, at positions spread evenly over it. Unequal prompts: {least} to {prompt} tokens. Two
processes: bytes that a rank receives; CPU seconds of a rank, gathering included."""


@dataclass(frozen=True)
class Row:
    """One line: median milliseconds, and medians over the rounds of ratios within a round."""

    vocab: int
    rows: int
    name: str
    milliseconds: float
    over_generate: float | None
    of_rollout: float | None
    rounds_ms: list[float]


def main(arguments: list[str]) -> int:
    """Measures the grid and prints the tables; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        device = find_device(options.device)
    except ConfigError as error:
        print(f"benchmark.py rollout: {error}")
        return 2
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if device.type == "cpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "command": "python tools/benchmark.py rollout " + shlex.join(arguments),
        "machine": machine(device) | {name: version(name) for name in ("transformers", "deepspeed")},
        "rows": [],
        "parallel": [],
        "operations": {},
    }
    for vocab in options.vocab:
        for rows in options.rows:
            print(f"measuring V={vocab}, {rows} rows", file=sys.stderr, flush=True)
            sizes = _sizes(options, vocab, rows)
            record["rows"] += [asdict(row) for row in measure(sizes, options.vllm_python)]
            record["operations"] = operations(sizes)._asdict()
        if not options.no_parallel and device.type == "cpu":
            print(f"measuring V={vocab}, two processes", file=sys.stderr, flush=True)
            sizes = _sizes(options, vocab, options.rows[0])
            with tempfile.TemporaryDirectory() as folder:
                record["parallel"].append(measure_parallel(sizes, Path(folder)))
        text = table(record, options)
        if options.output:
            save(options.output, record, text)
    print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmark.py rollout", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--vocab", type=at_least(1), nargs="+", default=[8192, 32768], help="classes, V")
    parser.add_argument("--rows", type=at_least(1), nargs="+", default=[8, 32], help="examples decoded together")
    parser.add_argument("--prompt-tokens", type=at_least(1), default=64)
    parser.add_argument("--new-tokens", type=at_least(1), default=64)
    parser.add_argument("--rounds", type=at_least(1), default=7)
    parser.add_argument("--no-parallel", action="store_true", help="leave out what takes two processes (CPU only)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the student")
    parser.add_argument("--models", choices=MODELS, default="small", help="shape of the student; tiny is for tests")
    parser.add_argument(
        "--vllm-python", type=Path, help="interpreter of an environment with vLLM: adds its line (wall time)"
    )
    parser.add_argument("--output", type=Path, help="JSON file; the tables go beside it as .md")
    return parser


def _sizes(options: argparse.Namespace, vocab: int, rows: int) -> Sizes:
    return Sizes(
        vocab, rows, options.prompt_tokens, options.new_tokens, options.rounds, options.models, options.device,
        options.dtype,
    )  # fmt: skip


def measure(sizes: Sizes, vllm_python: Path | None = None) -> list[Row]:
    """All lines of one size, in turn in one process; vLLM's, where there is one, in a process of its own."""
    from megadistill.data.sample import Sample
    from megadistill.decoding.hf_decoder import HFDecoder, make_decoder
    from megadistill.decoding.layouts import choose_layouts, product_shapes
    from megadistill.decoding.products import PACKED
    from megadistill.decoding.rollout import Correction, RolloutState
    from megadistill.decoding.sampling import Sampling
    from megadistill.models.families import FAMILIES
    from megadistill.parallel import VocabShard
    from megadistill.parallel.output_head import OutputHead

    model = make_student(sizes)
    device, shard = torch.device(sizes.device), VocabShard(0, sizes.vocab, sizes.vocab)
    now = clock(device)
    chance = random.Random(0)
    prompts = [tuple(chance.randrange(3, sizes.vocab) for _ in range(sizes.prompt_tokens)) for _ in range(sizes.rows)]
    shorter = [prompt[: chance.randint(-(-sizes.prompt_tokens // 2), sizes.prompt_tokens)] for prompt in prompts]
    head = OutputHead(model.lm_head.weight, None, shard)
    plan = FAMILIES["llama"].plan(model)
    is_cpu = device.type == "cpu"  # once a run, hence not part of the time
    shapes = product_shapes(plan, model.lm_head.weight, lambda w: w.shape)
    layouts = choose_layouts("auto", shapes, head.weight.dtype) if is_cpu else PACKED
    states: dict[str, RolloutState] = {}

    def write(name: str, texts: list[tuple[int, ...]], make: Callable[[], Any]) -> None:
        samples = [Sample(i, text) for i, text in enumerate(texts)]
        limits = [sizes.new_tokens] * sizes.rows
        # Making the decoder is part of the time: it joins weights, again after every update.
        states[name] = RolloutState(
            make(), samples, limits=limits, eos_ids=frozenset(), sampling=Sampling(0), keep_hidden=True
        )
        states[name].write(0)

    def ours() -> Any:
        return make_decoder(model, plan, shard, device, layouts)

    def rewrite() -> None:
        positions = [(2 * i + 1) * sizes.new_tokens // (2 * sizes.rows) for i in range(sizes.rows)]
        chance.shuffle(positions)
        states["rollout"].rewrite([Correction(i, position, 5) for i, position in enumerate(positions)], 1)

    calls: dict[str, Callable[[], Any]] = {
        "transformers generate": lambda: generate(model, prompts, sizes.new_tokens),
        "products of the decoded tokens": lambda: products(model, sizes),
        "megadistill, the family's own forward": lambda: write(
            "forward", prompts, lambda: HFDecoder(model, device, head)
        ),
        "megadistill rollout": lambda: write("rollout", prompts, ours),
        "megadistill re-generation": rewrite,
        "transformers generate, unequal prompts": lambda: generate(model, shorter, sizes.new_tokens),
        "megadistill rollout, unequal prompts": lambda: write("unequal", shorter, ours),
    }
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        timed: dict[str, Callable[[], float]] = {name: partial(_seconds, call, now) for name, call in calls.items()}
        if vllm_python is not None:
            try:
                vllm = VllmRollout(vllm_python, Path(folder), model, prompts, sizes.new_tokens, sizes.device)
            except RuntimeError as error:  # the other lines are worth having
                print(f"left out: {error}", file=sys.stderr)
            else:
                stack.callback(vllm.close)
                timed["vLLM (its own process, wall time)"] = vllm.seconds
        times = _rounds(timed, sizes.rounds)
    return _as_rows(times, sizes)


def _seconds(call: Callable[[], Any], now: Callable[[], float]) -> float:
    begin = now()
    call()
    return now() - begin


def _rounds(timed: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every line in every round, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(rounds + 1):
        for name, call in timed.items():
            seconds = call()
            if number:
                times[name].append(seconds)
    return times


def _as_rows(times: dict[str, list[float]], sizes: Sizes) -> list[Row]:
    rows = []
    for name, mine in times.items():
        generated = times["transformers generate" + ", unequal prompts" * name.endswith("unequal prompts")]
        over = [theirs / own for theirs, own in zip(generated, mine, strict=True)]
        of = [own / rollout for own, rollout in zip(mine, times["megadistill rollout"], strict=True)]
        is_whole = "re-generation" not in name
        rows.append(
            Row(
                sizes.vocab,
                sizes.rows,
                name,
                1e3 * statistics.median(mine),
                statistics.median(over) if is_whole else None,
                statistics.median(of),
                [round(1e3 * seconds, 1) for seconds in mine],
            )  # fmt: skip
        )
    return rows


def make_student(sizes: Sizes, num_layers: int | None = None) -> Any:
    """The student of the step benchmark, with random weights; ``num_layers`` in place of its own."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    config = model_config("student", sizes)
    config.num_hidden_layers = num_layers or config.num_hidden_layers
    with torch.device(sizes.device):
        return LlamaForCausalLM(config).to(getattr(torch, sizes.dtype)).eval()


def operations(sizes: Sizes) -> TokenOperations:
    """Operations that a decoded token dispatches."""
    from megadistill.decoding.decoder import PlanDecoder
    from megadistill.decoding.sampling import Sampling
    from megadistill.models.families import FAMILIES
    from megadistill.parallel import VocabShard
    from megadistill.parallel.output_head import OutputHead

    shard = VocabShard(0, sizes.vocab, sizes.vocab)

    def make(num_layers: int) -> PlanDecoder:
        model = make_student(sizes, num_layers)
        plan = FAMILIES["llama"].plan(model)
        assert plan is not None
        return PlanDecoder(plan, torch.device(sizes.device), OutputHead(model.lm_head.weight, None, shard))

    return token_operations(make, Sampling(0))


def generate(model: Any, prompts: list[tuple[int, ...]], new_tokens: int) -> None:
    """Sampling by transformers, prompts padded on the left."""
    from megadistill.data.collate import left_padded

    batch = left_padded(prompts, 0).to(model.device)
    found = model.generate(
        batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=new_tokens, do_sample=True, top_k=0,
        top_p=1.0, temperature=1.0, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    assert found.shape[1] == batch.input_ids.shape[1] + new_tokens


@torch.no_grad()
def products(model: Any, sizes: Sizes) -> None:
    """The matrix products of decoding, query-key-value and gate-up joined."""
    joined = [
        (
            torch.cat([layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight]),
            layer.self_attn.o_proj.weight,
            torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]),
            layer.mlp.down_proj.weight,
        )
        for layer in model.model.layers
    ]
    like = {"device": model.device, "dtype": model.dtype}
    hidden = torch.randn(sizes.rows, model.config.hidden_size, **like)
    wide = torch.randn(sizes.rows, model.config.intermediate_size, **like)
    for _ in range(sizes.new_tokens):
        for qkv, out, up, down in joined:
            for x, weight in ((hidden, qkv), (hidden, out), (hidden, up), (wide, down)):
                torch.nn.functional.linear(x, weight)
        torch.nn.functional.linear(hidden, model.lm_head.weight)


def table(record: dict[str, Any], options: Any) -> str:
    """Markdown: a table per size, and one for two processes."""
    about = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    sizes, is_cpu = _sizes(options, options.vocab[0], options.rows[0]), options.device == "cpu"
    legend = _LEGEND.format(
        parameters=num_parameters("student", sizes) / 1e6, dtype=sizes.dtype,
        clock="CPU seconds" if is_cpu else "wall time", prompt=options.prompt_tokens, new=options.new_tokens,
        least=-(-options.prompt_tokens // 2),
    )  # fmt: skip
    lines = [f"`{record['command']}`", "", about, "", legend]
    for vocab, rows in dict.fromkeys((row["vocab"], row["rows"]) for row in record["rows"]):
        lines += ["", f"V = {vocab}, {rows} rows, {options.rounds} rounds", ""]
        lines += [f"| | {'CPU ' * is_cpu}ms | rollout over generate | of a rollout |", "|---|---|---|---|"]
        for row in record["rows"]:
            if (row["vocab"], row["rows"]) == (vocab, rows):
                over = "" if row["over_generate"] is None else f"{row['over_generate']:.2f}"
                lines.append(f"| {row['name']} | {row['milliseconds']:.0f} | {over} | {row['of_rollout']:.2f} |")
    layer, outside, sampling = record["operations"].values()
    lines += [
        "",
        f"Operations of a token: {layer} in each layer, {outside} outside of them, {sampling} for logits and drawing",
    ]
    if record["parallel"]:
        lines += [
            "",
            f"Two processes, one thread each: {options.rows[0]} rows together (TP 2), as many each (DP 2)",
            "",
        ]
        lines += [
            "| V | bytes a row and token, TP 2: sampling | the model's own reductions | ZeRO-3 over ZeRO-0, DP 2 | "
            "of it gathering |",
            "|---|---|---|---|---|",
        ]
        for found in record["parallel"]:
            lines.append(
                f"| {found['vocab']} | {found['sampling_bytes']:.0f} | {found['model_bytes']:.0f} | "
                f"{found['zero3_over_zero0']:.2f} | {found['gather_share']:.2f} |"
            )
    return "\n".join(lines)
