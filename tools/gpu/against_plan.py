"""The planner against a card: a real step's memory and seconds beside those of its dry run.

The step is that of ``megadistill plan --exact``: the same rows, the same corrections, no text that ends early. On the
card nothing counts along; what is read is ``torch.cuda.max_memory_allocated`` and the clock, phase by phase. On a CPU
(a rehearsal of the kit) there are times alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megadistill.config.schema import RunConfig
from megadistill.planning.counter import Counter
from megadistill.planning.use import PHASES, StepUse
from tools.benchmarks.measure import find_device, machine, save
from tools.benchmarks.step_workers import Sizes, model_config

_ROWS, _ROUNDS = 16, 3
_LEGEND = """\
Student and teacher of the step benchmark's sizes, {dtype}, ZeRO-3, {rows} rows of {prompt} + {new} tokens with
references and SCRG. Memory in MB: the most that was allocated in a phase, on the card and in the dry run. Seconds:
median of {rounds} steps. TFLOP/s: the dry run's FLOPs over the card's seconds. us: seconds over the dry run's
launches, an upper bound of what one takes."""


class Card(Counter):
    """Stands for the counter of a counted step: reads the card instead.

    Attributes:
        peaks: Phase -> the most bytes that were allocated in it.
        seconds: Phase -> its seconds in each step.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.peaks: dict[str, int] = {}
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.resident = 0
        self._device = device

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a phase and reads its peak."""
        if name not in PHASES:
            yield
            return
        begin = self._now()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        yield
        self.seconds[name].append(self._now() - begin)
        if self._device.type == "cuda":
            self.peaks[name] = max(self.peaks.get(name, 0), torch.cuda.max_memory_allocated(self._device))

    def start(self) -> None:
        """Forgets the steps before."""
        self.peaks.clear()
        self.seconds.clear()
        if self._device.type == "cuda":
            self.resident = torch.cuda.memory_allocated(self._device)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def configuration(folder: Path, sizes: Sizes) -> RunConfig:
    """The run: both models as configuration files in ``folder``."""
    dtype = "bf16" if sizes.dtype == "bfloat16" else "fp32"
    model: dict[str, Any] = {}
    for role in ("teacher", "student"):
        model_config(role, sizes).to_json_file(folder / f"{role}.json", use_diff=False)
        model[role] = {"path": str(folder / f"{role}.json"), "dtype": dtype}
    tokens = sizes.prompt_tokens + sizes.new_tokens
    tree = {
        "run": {"dir": "unused"},
        "model": model,
        "parallel": {"tp_size": 1, "zero_stage": 3},
        "data": {"train_path": "unused", "max_prompt_tokens": sizes.prompt_tokens, "max_tokens": tokens},
        "generation": {"max_new_tokens": sizes.new_tokens},
        "train": {"global_batch_size": sizes.rows, "micro_batch_size": max(1, sizes.rows // 4)},
    }
    return RunConfig.model_validate(tree)


def on_the_card(config: RunConfig, sizes: Sizes) -> Card:
    """Some real steps; the last ones are read."""
    from megadistill.launch.world import distributed
    from megadistill.parallel.context import ParallelContext
    from megadistill.planning.counted_step import Lengths, counted_step, plannable, vocabulary

    planned, _ = plannable(config)
    with distributed(300) as device:
        card = Card(device)
        context = ParallelContext.build(1, 300, device)
        counted_step(
            planned, context, card, Lengths(sizes.prompt_tokens, sizes.new_tokens), source="measured",
            vocab_size=vocabulary(config), repeats=sizes.rounds,
        )  # fmt: skip
    return card


def rows(card: Card, dry: StepUse) -> list[dict[str, Any]]:
    """A row of the table for each phase of the dry run."""
    found = []
    for phase in dry.phases:
        times = card.seconds[phase.name]
        per_step = len(times) // _ROUNDS  # a phase may run more than once a step
        steps = [sum(times[i : i + per_step]) for i in range(0, len(times), per_step)]
        seconds = statistics.median(steps)
        found.append(
            {
                "phase": phase.name, "card_bytes": card.peaks.get(phase.name), "dry_bytes": phase.peak,
                "seconds": seconds, "flops": phase.flops, "launches": phase.operations,
            }
        )  # fmt: skip
    return found


def table(record: dict[str, Any], sizes: Sizes) -> str:
    """The record in Markdown."""
    legend = _LEGEND.format(
        dtype=sizes.dtype, rows=sizes.rows, prompt=sizes.prompt_tokens, new=sizes.new_tokens, rounds=sizes.rounds
    )
    lines = [", ".join(f"{key} {value}" for key, value in record["machine"].items()), "", legend, ""]
    lines += [
        "| phase | card MB | dry run MB | card / dry run | seconds | TFLOP/s | us |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        card = row["card_bytes"]
        memory = ("", "") if card is None else (f"{card / 1e6:.1f}", f"{card / row['dry_bytes']:.3f}")
        lines.append(
            f"| {row['phase']} | {memory[0]} | {row['dry_bytes'] / 1e6:.1f} | {memory[1]} | {row['seconds']:.3f} | "
            f"{row['flops'] / row['seconds'] / 1e12:.2f} | {row['seconds'] / max(1, row['launches']) * 1e6:.1f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Measures and compares; 0 where it ran."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.against_plan", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", default="medium", help="sizes of the step benchmark")
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=128, help="of prompts, and of responses")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; a table goes beside it as .md")
    parsed = parser.parse_args(arguments)
    device = find_device(parsed.device)
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    sizes = Sizes(parsed.vocab, _ROWS, parsed.tokens, parsed.tokens, _ROUNDS, parsed.models, device.type, dtype)
    from megadistill.planning.dry_run import dry_run_in_process

    with tempfile.TemporaryDirectory() as name:
        config = configuration(Path(name), sizes)
        memory = torch.cuda.get_device_properties(0).total_memory if device.type == "cuda" else 0
        dry = dry_run_in_process(
            config, rank=0, world_size=1, like_gpu=device.type == "cuda", gpu_memory=memory,
            prompt_tokens=sizes.prompt_tokens, response_tokens=sizes.new_tokens,
        )  # fmt: skip
        card = on_the_card(config, sizes)
    resident = {"resident_card": card.resident, "resident_dry": sum(dry.resident.values())}
    record = {"machine": machine(device), **resident, "rows": rows(card, dry)}
    text = table(record, sizes)
    save(parsed.output, record, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
