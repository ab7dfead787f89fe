"""The objective against its matrix products, dense code and peers."""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import shlex
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from megadistill.errors import ConfigError
from megadistill.losses import Head
from megadistill.losses.reference import reference_loss
from megadistill.parallel import VocabShard
from tools.benchmarks import contenders as field
from tools.benchmarks.measure import at_least, find_device, machine, peak_bytes, save, seconds

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ERROR_ELEMENTS = 2**22  # tokens times classes of the problem on which gradients are compared with float64
_LEGEND = """\
Work: the four matrix products; cross-entropy and forward KL; the KL alone; everything (cross-entropy, DAC-KL with its
gate, span), and everything with one option changed. s: best of the rounds, CPU seconds of one thread (CUDA: between
events). Ratio: median over the rounds of time over the products' in the same round, the products in chunks of the same
size. Peak: GB above the inputs, then the same without the gradients. Error: worse of hidden and weight gradient against
the dense float64 reference, relative to its largest entry, on fewer tokens; not measured across shards (tests do)."""


@dataclass(frozen=True)
class Case:
    """One problem size."""

    num_rows: int
    num_classes: int
    tp_size: int
    width: int
    dtype: str

    @property
    def sizes(self) -> tuple[int, int, int, str]:
        """All but the number of shards."""
        return self.num_rows, self.num_classes, self.width, self.dtype


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        case: The problem size.
        name: The contender's.
        work: The contender's.
        seconds: Time of the best round.
        ratio: Median over the rounds of its time over the floor's in the same round.
        peak_bytes: Peak memory, gradients included.
        gradient_bytes: Memory of the gradients.
        error: Error of the worse of hidden and weight gradient against float64, relative to the largest entry.
        skipped: Why there are no numbers.
    """

    case: Case
    name: str
    work: str
    seconds: float | None = None
    ratio: float | None = None
    peak_bytes: int | None = None
    gradient_bytes: int | None = None
    error: float | None = None
    skipped: str = ""


def main(arguments: list[str]) -> int:
    """Runs the grid and prints the table; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        device = find_device(options.device)
    except ConfigError as error:
        print(f"benchmark.py loss: {error}")
        return 2
    torch.set_num_threads(1)
    # What is compiled for one size is compiled anew for the next: beyond torch's limit it would run eagerly, unsaid.
    torch._dynamo.config.recompile_limit = 256
    grid = itertools.product(options.tokens, options.vocab, options.tp, options.hidden)
    cases = [Case(tokens, vocab, tp, width, options.dtype) for tokens, vocab, tp, width in grid]
    command = "python tools/benchmark.py loss " + shlex.join(arguments)
    rows: list[Row] = []
    with tqdm(total=len(cases), unit="size", disable=not sys.stderr.isatty()) as bar:
        for case in cases:
            name = f"T={case.num_rows} V={case.num_classes} H={case.width} tp={case.tp_size}"
            bar.set_postfix_str(name)
            if bar.disable:
                print(f"measuring {name}", file=sys.stderr, flush=True)
            rows += _measure(case, options, device)
            if options.output:  # after each size: a long run may be ended early
                _write(rows, command, device, options.output)
            bar.update()
    print(table(rows, command, machine(device)))
    return 0


def _write(rows: list[Row], command: str, device: torch.device, output: Path) -> None:
    record: dict[str, Any] = {"command": command, "machine": machine(device), "peers": field.versions()}
    record["rows"] = [asdict(row) for row in rows]
    save(output, record, table(rows, command, machine(device)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmark.py loss",
        description=f"{__doc__} The default grid takes hours on two CPU cores; name fewer sizes for a look.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--tokens", type=at_least(1), nargs="+", default=[512, 2048, 8192], help="token positions, T")
    parser.add_argument("--vocab", type=at_least(1), nargs="+", default=[32768, 131072, 262144], help="classes, V")
    parser.add_argument("--hidden", type=at_least(1), nargs="+", default=[512], help="hidden size of both models, H")
    parser.add_argument("--tp", type=at_least(1), nargs="+", default=[1, 2], help="vocabulary shards, one process each")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="float32", help="of hidden states and heads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--rounds", type=at_least(1), default=3, help="each contender runs once a round, after a warm-up"
    )
    parser.add_argument(
        "--max-tera-flops", type=float, default=4.0, help="larger problems: the floor and ours, one round"
    )
    parser.add_argument("--memory-gib", type=float, default=16.0, help="dense code that needs more is skipped")
    parser.add_argument("--no-error", action="store_true", help="leave out the comparison with float64")
    parser.add_argument("--output", type=Path, help="JSON file; the table goes beside it as .md")
    return parser


def _measure(case: Case, options: Any, device: torch.device) -> list[Row]:
    if case.tp_size == 1:
        return _measure_here(case, VocabShard(0, case.num_classes, case.num_classes), options, device)
    if device.type == "cuda" and torch.cuda.device_count() < case.tp_size:
        return [Row(case, "all", "all", skipped=f"{torch.cuda.device_count()} CUDA devices")]
    # One process per shard; they meet at a file: nothing listens on an outside address.
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.get_context("spawn")
        results = context.Queue()
        arguments = (case, options, device.type, folder, results)
        ranks = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(case.tp_size)]
        for process in ranks:
            process.start()
        while not results.empty() or any(process.is_alive() for process in ranks):
            if any(process.exitcode for process in ranks):
                for process in ranks:
                    process.kill()
                raise RuntimeError(f"a rank of {case} ended with exit code {[p.exitcode for p in ranks]}")
            try:
                rows = results.get(timeout=1.0)
                break
            except Exception:  # queue.Empty: not done yet
                continue
        for process in ranks:
            process.join()
        return rows


def _rank(rank: int, case: Case, options: Any, device_type: str, folder: str, results: Any) -> None:
    torch.set_num_threads(1)
    backend = "nccl" if device_type == "cuda" else "gloo"
    store = dist.FileStore(f"{folder}/store", case.tp_size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=case.tp_size, timeout=timedelta(minutes=30))
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    shard = VocabShard.split(case.num_classes, case.tp_size, rank, dist.group.WORLD)
    rows = _measure_here(case, shard, options, device)
    if rank == 0:
        results.put(rows)
    dist.barrier()
    dist.destroy_process_group()


def _measure_here(case: Case, shard: VocabShard, options: Any, device: torch.device) -> list[Row]:
    dtype = _DTYPES[case.dtype]
    problem = field.make_problem(case.num_rows, shard, case.width, dtype, device)
    is_small = 8e-12 * case.num_rows * case.num_classes * case.width <= options.max_tera_flops
    backends = field.usable_backends(device)
    kept = [field.floor(problem), *field.ours(problem, backends if is_small else backends[:1])]
    rows = []
    for contender in [*field.dense(problem), *field.peers(problem)]:
        need = 4 * case.num_rows * shard.size * contender.dense_tiles / 2**30
        reason = f"about {need:.0f} GiB" if need > options.memory_gib else "too long" if not is_small else ""
        if reason:
            rows.append(Row(case, contender.name, contender.work, skipped=reason))
        else:
            kept.append(contender)
    _warm_up(problem, kept, rows, case, device)
    gradients = 4 * (problem.student.weight.numel() + problem.student.hidden.numel())
    peaks: dict[int, int] = {}
    times: dict[int, list[float]] = {id(contender): [] for contender in kept}
    for number in range(options.rounds if is_small else 1):
        for contender in kept:
            problem.clear()
            mine = times[id(contender)]
            if number == 0:
                call = lambda: mine.append(seconds(contender.run, device))  # noqa: E731, B023
                peaks[id(contender)] = peak_bytes(call, device)
            else:
                mine.append(seconds(contender.run, device))
    base = times[id(kept[0])]
    errors = {} if options.no_error or not is_small or shard.tp_size > 1 else _errors(case, device)
    measured = [
        Row(
            case,
            contender.name,
            contender.work,
            seconds=min(times[id(contender)]),
            ratio=statistics.median(mine / floor for mine, floor in zip(times[id(contender)], base, strict=True)),
            peak_bytes=peaks[id(contender)],
            gradient_bytes=gradients,
            error=errors.get((contender.name, contender.work)),
        )
        for contender in kept
    ]
    return measured + rows


def _warm_up(
    problem: field.Problem, kept: list[field.Contender], rows: list[Row], case: Case, device: torch.device
) -> None:
    """Compiles and fills the allocator. A contender that fails moves from ``kept`` to ``rows``.

    Ours compile for any number of tokens, so a few are enough; the others compile for this number.
    """
    few = field.first_tokens(problem)
    for contender in list(kept):
        problem.clear()
        try:
            (contender.on(few) if contender.on else contender).run()
        except Exception as error:
            kept.remove(contender)
            reason = f"failed: {str(error).splitlines()[0][:80]}"
            rows.append(Row(case, contender.name, contender.work, skipped=reason))
    problem.clear()


def _errors(case: Case, device: torch.device) -> dict[tuple[str, str], float]:
    """Largest gradient error of each contender on a problem small enough for the dense float64 reference."""
    num_rows = max(8, min(case.num_rows, _ERROR_ELEMENTS // case.num_classes))
    return _errors_of(replace(case, num_rows=num_rows), device)


@functools.cache
def _errors_of(case: Case, device: torch.device) -> dict[tuple[str, str], float]:
    shard = VocabShard(0, case.num_classes, case.num_classes)
    problem = field.make_problem(case.num_rows, shard, case.width, _DTYPES[case.dtype], device, seed=1)
    torch.set_num_threads(os.cpu_count() or 1)  # nothing is timed here
    expected = {work: _expected(problem, work) for work in ("ce+kl", "kl", "full", *field.OPTIONS)}
    torch.set_num_threads(1)
    found = {}
    for contender in [
        *field.ours(problem, field.usable_backends(device)), *field.dense(problem), *field.peers(problem)
    ]:  # fmt: skip
        problem.clear()
        try:
            contender.run()
        except Exception:
            continue  # the table has the reason
        worst = 0.0
        for part, exact in zip((problem.student.hidden, problem.student.weight), expected[contender.work], strict=True):
            assert part.grad is not None
            gradient = part.grad.double().cpu() * contender.scale
            worst = max(worst, float((gradient - exact).abs().max() / exact.abs().max()))
        found[contender.name, contender.work] = worst
    return found


def _expected(problem: field.Problem, work: str) -> tuple[torch.Tensor, ...]:
    """Hidden and weight gradient from the dense reference in float64."""

    def double(head: Head) -> Head:
        return Head(head.hidden.detach().double().cpu(), head.weight.detach().double().cpu())

    student, teacher = double(problem.student), double(problem.teacher)
    sources = (student.hidden.requires_grad_(), student.weight.requires_grad_())
    config = {"full": field.FULL, **field.OPTIONS}.get(work, field.CE_KL)
    gate = problem.gate if config.upper == 1 else problem.two_sided_gate
    output = reference_loss(
        student, teacher, problem.labels.cpu(), problem.pairs.cpu(), gate.cpu(), config,
        num_tokens=problem.num_tokens, num_pairs=problem.num_pairs,
    )  # fmt: skip
    gate.to(problem.labels.device)
    loss = output.dac_kl if work == "kl" else output.loss
    return torch.autograd.grad(loss, sources)


def table(rows: list[Row], command: str, where: dict[str, Any]) -> str:
    """Markdown, one block per size."""
    lines = [f"`{command}`", "", ", ".join(f"{key} {value}" for key, value in where.items()), ""]
    lines.append(_LEGEND)
    columns = ["", "work", "s", "ratio", "s over tp 1's", "peak GB", "GB without gradients", "gradient error"]
    alone = {(row.case.sizes, row.name, row.work): row.seconds for row in rows if row.case.tp_size == 1}
    for case, group in itertools.groupby(rows, key=lambda row: row.case):
        tokens, classes, width, dtype = case.sizes
        lines += ["", f"T = {tokens}, V = {classes}, H = {width}, {dtype}, tp {case.tp_size}", ""]
        lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        for row in group:
            cells = [row.name, row.work, row.skipped] if row.skipped else _cells(row, alone)
            lines.append("| " + " | ".join(cells + [""] * (len(columns) - len(cells))) + " |")
    return "\n".join(lines)


def _cells(row: Row, alone: dict[Any, float | None]) -> list[str]:
    assert row.seconds is not None and row.ratio is not None
    assert row.peak_bytes is not None and row.gradient_bytes is not None
    one = alone.get((row.case.sizes, row.name, row.work)) if row.case.tp_size > 1 else None
    return [
        row.name,
        row.work,
        f"{row.seconds:.3f}",
        f"{row.ratio:.2f}",
        f"{row.seconds / one:.2f}" if one else "",
        f"{row.peak_bytes / 1e9:.2f}",
        f"{max(row.peak_bytes - row.gradient_bytes, 0) / 1e9:.2f}",
        "" if row.error is None else f"{row.error:.1e}",
    ]
