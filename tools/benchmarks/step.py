"""A whole distillation step against TRL's DistillationTrainer."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import statistics
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megadistill.errors import ConfigError
from tools.benchmarks.measure import at_least, find_device, machine, save
from tools.benchmarks.step_workers import (
    MODELS,
    WARM_UP,
    Contender,
    Failure,
    Sizes,
    Step,
    num_parameters,
    work,
    write_assets,
)

_LEGEND = """\
Student {student}M, teacher {teacher}M. Each contender has a process of one thread; all take turns, a step at a time,
after two steps that do not count. ms: {clock}, median over the rounds. Ratios: median over the rounds of its time over
that of {base} (plain on-policy forward KL, no gradient checkpointing, fused AdamW) in the same round. {about}Random
weights, the same for all; no response ends before the limit. Phases: medians; rest: what no phase covers. References:
{new} tokens per example. Corrected: share of the responses; position: mean index of the correction; distinct-n: share
of different n-grams among those of a step's responses, as the student wrote them and after SCRG (random words: this
shows that SCRG keeps their diversity, not how diverse a language model is)."""


@dataclass(frozen=True)
class Row:
    """One line of the table; times in milliseconds, of the CPU or of the wall (CUDA), medians over the rounds.

    Attributes:
        sizes: The problem size.
        name: The contender's.
        cpu_ms: Time of a step.
        ratio: To the first of TRL's lines.
        ratio_bf16: To the second.
        phases_ms: Time of each phase.
        facts: Other numbers of a step.
        rounds_ms: Time of each round.
        skipped: Why there are no numbers.
    """

    sizes: Sizes
    name: str
    cpu_ms: float | None = None
    ratio: float | None = None
    ratio_bf16: float | None = None
    phases_ms: dict[str, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    rounds_ms: list[float] = field(default_factory=list)
    skipped: str = ""


def contenders(device: str) -> list[Contender]:
    """The lines of the table, TRL's two first."""
    plain: dict[str, dict[str, Any]] = {
        "generation": {"scrg": {"enabled": False}},
        "loss": {"clip": "off", "span": 0.0},
    }
    if device != "cpu":
        return [
            Contender("TRL DistillationTrainer, bf16 weights", "bf16", "bf16", is_trl=True),
            Contender("TRL DistillationTrainer, autocast", "bf16", is_trl=True, has_autocast=True),
            Contender("megadistill, plain on-policy KL", "bf16", "bf16", settings=plain),
            Contender("megadistill, SCRG", "bf16", "bf16"),
            Contender("megadistill, SCRG + SFT on references", "bf16", "bf16", has_references=True),
        ]
    return [
        Contender("TRL DistillationTrainer", is_trl=True),
        Contender("TRL DistillationTrainer, bf16 teacher", "bf16", is_trl=True),
        Contender("megadistill, plain on-policy KL", settings=plain),
        Contender("megadistill, SCRG"),
        Contender("megadistill, SCRG, bf16 teacher", "bf16"),
        Contender("megadistill, SCRG + SFT on references", has_references=True),
    ]


def main(arguments: list[str]) -> int:
    """Measures every vocabulary size and prints the table; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        device = find_device(options.device)
    except ConfigError as error:
        print(f"benchmark.py step: {error}")
        return 2
    known = contenders(device.type)
    chosen = [one for one in known if any(part in one.name for part in options.only or [""])]
    if not chosen:
        names = "; ".join(one.name for one in known)
        print(f"benchmark.py step: --only {' '.join(options.only)}: not in any name; allowed: {names}")
        return 2
    # For the workers, which inherit it: one thread, nothing fetched, and without --device cuda no GPU.
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if device.type == "cpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = "python tools/benchmark.py step " + shlex.join(arguments)
    record: dict[str, Any] = {"command": command, "machine": machine(device), "versions": _versions()}
    rows: list[Row] = []
    for vocab in options.vocab:
        sizes = Sizes(
            vocab, options.rows, options.prompt_tokens, options.new_tokens, options.rounds, options.models,
            device.type, "float32" if device.type == "cpu" else "bfloat16",
        )  # fmt: skip
        print(f"measuring V={vocab}", file=sys.stderr, flush=True)
        rows += measure(chosen, sizes)
        text = table(rows, record)
        if options.output:  # after each size: a long run may be ended early
            save(options.output, record | {"rows": [asdict(row) for row in rows]}, text)
    print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmark.py step", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--vocab", type=at_least(16), nargs="+", default=[8192, 32768], help="classes, V")
    parser.add_argument("--rows", type=at_least(1), default=8, help="prompts per step, in one micro-batch")
    parser.add_argument("--prompt-tokens", type=at_least(1), default=64, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=at_least(1), default=64, help="tokens of a response")
    parser.add_argument("--rounds", type=at_least(1), default=9, help="each contender runs one step per round")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="the contenders whose names hold one of these")
    parser.add_argument("--output", type=Path, help="JSON file; the table goes beside it as .md")
    parser.add_argument("--models", choices=MODELS, default="small", help="shapes of both models; tiny is for tests")
    parser.add_argument("--device", default="cpu")
    return parser


def _versions() -> dict[str, str]:
    names = ("trl", "accelerate", "transformers", "deepspeed")
    return {name: version(name) if importlib.util.find_spec(name) else "not installed" for name in names}


def measure(chosen: list[Contender], sizes: Sizes) -> list[Row]:
    """All rounds of one size; the line of a contender that fails has the reason."""
    skipped: dict[str, str] = {}
    times: dict[str, list[Step]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_assets(folder, sizes)
        workers = {}
        for contender in chosen:
            if contender.is_trl and importlib.util.find_spec("trl") is None:
                skipped[contender.name] = "trl is not installed"
            else:
                workers[contender.name] = Worker(contender, sizes, folder)
        try:
            for number in range(sizes.steps):
                for name, worker in list(workers.items()):
                    result = worker.step()
                    if isinstance(result, Failure):
                        print(f"{name} failed: {result.reason}\n{result.details}", file=sys.stderr)
                        skipped[name] = f"failed: {result.reason[:80]}"
                        workers.pop(name).end()
                    elif number >= WARM_UP:
                        times.setdefault(name, []).append(result)
        finally:
            for worker in workers.values():
                worker.end()
    return [
        Row(sizes, one.name, skipped=skipped[one.name]) if one.name in skipped else _row(one, sizes, times)
        for one in chosen
    ]


def _row(contender: Contender, sizes: Sizes, times: dict[str, list[Step]]) -> Row:
    mine = times[contender.name]

    trl = [one.name for one in contenders(sizes.device) if one.is_trl]

    def ratio(other: str) -> float | None:
        theirs = times.get(other, [])
        if len(theirs) < len(mine):
            return None
        return statistics.median(a.seconds / b.seconds for a, b in zip(mine, theirs, strict=True))

    phases = {name: statistics.median(step.phases.get(name, 0.0) for step in mine) for name in mine[0].phases}
    phases["rest"] = statistics.median(step.seconds - sum(step.phases.values()) for step in mine)
    found = {name for step in mine for name in step.facts}
    return Row(
        sizes,
        contender.name,
        cpu_ms=1e3 * statistics.median(step.seconds for step in mine),
        ratio=ratio(trl[0]),
        ratio_bf16=ratio(trl[1]),
        phases_ms={name: 1e3 * seconds for name, seconds in phases.items()},
        facts={
            name: statistics.fmean(step.facts[name] for step in mine if name in step.facts) for name in sorted(found)
        },
        rounds_ms=[round(1e3 * step.seconds, 1) for step in mine],
    )


class Worker:
    """The parent's side of a contender's process."""

    def __init__(self, contender: Contender, sizes: Sizes, folder: Path) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(contender, sizes, folder, theirs), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe

    def step(self) -> Step | Failure:
        """Lets it run a step and waits for it."""
        with suppress(OSError):  # it may have ended: its last message is in the pipe
            self._pipe.send(True)
        try:
            result: Step | Failure = self._pipe.recv()
            return result
        except (EOFError, OSError):
            self._process.join(30)
            return Failure(f"its process ended with exit code {self._process.exitcode}")

    def end(self) -> None:
        with suppress(OSError):
            self._pipe.send(False)
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()


def table(rows: list[Row], record: dict[str, Any]) -> str:
    """Markdown, two tables per size."""
    about = ", ".join(f"{key} {value}" for key, value in (record["machine"] | record["versions"]).items())
    lines = [f"`{record['command']}`", "", about, "", _legend(rows[0].sizes)]
    is_cpu, trl = rows[0].sizes.device == "cpu", [one.name for one in contenders(rows[0].sizes.device) if one.is_trl]
    for sizes in dict.fromkeys(row.sizes for row in rows):
        mine = [row for row in rows if row.sizes == sizes]
        size = f"{sizes.rows} rows of {sizes.prompt_tokens} + {sizes.new_tokens} tokens, {sizes.rounds} rounds"
        lines += ["", f"V = {sizes.vocab}, {size}", ""]
        second = trl[1].partition(", ")[2]
        lines += _lines(["", f"{'CPU ' * is_cpu}ms a step", "ratio to TRL", f"to TRL, {second}", "phases, ms"])
        for row in mine:
            lines.append(_line([row.name, row.skipped, "", "", ""] if row.skipped else _cells(row)))
        lines += ["", *_lines(["", "mean length", "corrected", "position", "distinct-1, 2, 3 written", "after SCRG"])]
        lines += [_line([row.name, *_fact_cells(row.facts)]) for row in mine if row.facts]
    return "\n".join(lines)


def _legend(sizes: Sizes) -> str:
    is_cpu = sizes.device == "cpu"
    about = "Ours: bfloat16 weights, float32 ones in the optimizer. Autocast: float32 weights, bfloat16 teacher. "
    return _LEGEND.format(
        student=round(num_parameters("student", sizes) / 1e6),
        teacher=round(num_parameters("teacher", sizes) / 1e6),
        clock="CPU time" if is_cpu else "wall time",
        base="TRL, float32" if is_cpu else "TRL, bfloat16 weights and moments",
        about="" if is_cpu else about,
        new=sizes.new_tokens,
    )


def _lines(columns: list[str]) -> list[str]:
    return [_line(columns), "|---" * len(columns) + "|"]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(row: Row) -> list[str]:
    ratios = ["" if ratio is None else f"{ratio:.2f}" for ratio in (row.ratio, row.ratio_bf16)]
    phases = ", ".join(f"{name} {milliseconds:.0f}" for name, milliseconds in row.phases_ms.items())
    return [row.name, f"{row.cpu_ms:.0f}", *ratios, phases]


def _fact_cells(facts: dict[str, float]) -> list[str]:
    def shown(names: list[str], places: int) -> str:
        return ", ".join(f"{facts[name]:.{places}f}" for name in names if name in facts)

    distinct = [[f"distinct_{length}_{text}" for length in (1, 2, 3)] for text in ("student", "corrected")]
    single = [shown(["length"], 1), shown(["corrected_fraction"], 2), shown(["error_position"], 1)]
    return [*single, *(shown(names, 3) for names in distinct)]
