"""Everything that waits for a GPU, in one call of at most nine minutes: tests, faults, benchmarks, the demo.

Each part runs whatever the others did. The results are one JSON file and a table in Markdown beside it.
``--list`` shows the parts, ``--wheels`` what this machine lacks and the command that gathers it elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megadistill.files import did_you_mean, write_json  # noqa: E402
from tools.gpu.parts import Part, gpu_parts  # noqa: E402
from tools.gpu.wheels import PEERS, command, missing, other_versions, wanted  # noqa: E402

_TOGETHER = 3  # parts that are not timed run this many at a time
_LAST_LINES = 5


@dataclass(frozen=True)
class Outcome:
    """How a part ended.

    Attributes:
        part: The part.
        state: "passed", "failed", "out of time" or "not run".
        seconds: How long it took.
        reason: Why it did not pass, or what it counted.
    """

    part: Part
    state: str
    seconds: float = 0.0
    reason: str = ""


def run_part(part: Part, out: Path, deadline: float) -> Outcome:
    """Runs a part's commands, with their output in ``out/NAME.log``.

    Args:
        part: The part.
        out: Folder of the report.
        deadline: Of the whole report, as ``time.monotonic`` counts.
    """
    absent = missing(part.needs)
    if absent:
        return Outcome(part, "not run", reason=f"not installed: {', '.join(absent)}")
    begin = time.monotonic()
    end = min(begin + part.seconds, deadline)
    if end - begin < 1:
        return Outcome(part, "not run", reason="the report's time was over")
    if part.record is not None:
        part.record.unlink(missing_ok=True)  # an older one would look like this run's
    log = out / f"{part.name}.log"
    with log.open("w", encoding="utf-8") as file:
        for words in part.commands:
            file.write(f"$ {_shown(words)}\n")
            file.flush()
            code = _run(words, file, end)
            if code is None:
                return Outcome(part, "out of time", time.monotonic() - begin, f"in: {_shown(words)[:80]}")
            if code:
                return Outcome(part, "failed", time.monotonic() - begin, f"exit code {code}: {_last_lines(log)}")
    passed, counts = _counts(part.record)
    return Outcome(part, "failed" if passed == 0 else "passed", time.monotonic() - begin, counts)


def _run(words: Sequence[str], log: Any, end: float) -> int | None:
    """The exit code; None where the time was over, and the process and all below it are gone."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def _last_lines(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-_LAST_LINES:])[-400:]


def _counts(record: Path | None) -> tuple[int | None, str]:
    """How many of pytest's tests passed, and that in words; (None, "") for other records."""
    if record is None or record.suffix != ".xml" or not record.exists():
        return None, ""
    suites = list(ET.parse(record).getroot().iter("testsuite"))
    total = {name: sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "skipped")}
    passed = total["tests"] - total["skipped"]
    return passed, f"{passed} passed, {total['skipped']} skipped"


def run_parts(parts: Sequence[Part], out: Path, seconds: float) -> list[Outcome]:
    """Runs parts, those that are not timed first and side by side, in the order of ``parts``.

    Args:
        parts: The parts.
        out: Folder of the report.
        seconds: The most that all of them may take.
    """
    deadline = time.monotonic() + seconds

    def run(part: Part) -> Outcome:
        print(f"        {part.name}: {part.what}", flush=True)
        outcome = run_part(part, out, deadline)
        is_right = outcome.state == "passed"
        print(
            f"{'ok' if is_right else outcome.state.upper():<12}{part.name} ({outcome.seconds:.0f} s)"
            + (f": {outcome.reason}" if outcome.reason else ""),
            flush=True,
        )
        return outcome

    with ThreadPoolExecutor(_TOGETHER) as pool:
        together = list(pool.map(run, [part for part in parts if not part.is_timed]))
    return together + [run(part) for part in parts if part.is_timed]


def describe(device: str) -> dict[str, Any]:
    """The machine and its versions, without names of hosts or paths."""
    import torch

    from tools.benchmarks.measure import machine

    found = machine(torch.device(device))
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found |= {"gpu_memory_gib": round(card.total_memory / 2**30), "gpus": torch.cuda.device_count()}
        found["cuda"] = torch.version.cuda
    return found | {"other versions": other_versions(wanted()), "peers missing": missing(PEERS)}


def table(about: dict[str, Any], outcomes: Sequence[Outcome], invocation: str) -> str:
    """The report in Markdown: what ran, and the tables of the parts that have one."""
    lines = ["# On a GPU", "", f"`{invocation}`", ""]
    lines += [", ".join(f"{key} {value}" for key, value in about.items() if value and not isinstance(value, list)), ""]
    for key in ("other versions", "peers missing"):
        if about.get(key):
            lines += [f"{key.capitalize()}: {', '.join(about[key])}.", ""]
    lines += ["| part | what | outcome | seconds | |", "|---|---|---|---|---|"]
    for one in outcomes:
        reason = one.reason.replace("|", "/").replace("\n", " ")
        lines.append(f"| {one.part.name} | {one.part.what} | {one.state} | {one.seconds:.0f} | {reason} |")
    for one in outcomes:
        page = None if one.part.record is None else one.part.record.with_suffix(".md")
        if page is not None and page.exists():
            lines += ["", f"## {one.part.name}", "", page.read_text(encoding="utf-8").strip()]
    return "\n".join(lines) + "\n"


def as_record(about: dict[str, Any], outcomes: Sequence[Outcome], invocation: str) -> dict[str, Any]:
    """The report for JSON, with the records of the parts."""

    def of(one: Outcome) -> dict[str, Any]:
        path = one.part.record
        has_record = path is not None and path.suffix == ".json" and path.exists()
        return {
            "name": one.part.name, "what": one.part.what, "state": one.state, "seconds": round(one.seconds, 1),
            "reason": one.reason, "commands": [_shown(words) for words in one.part.commands],
            "record": json.loads(path.read_text(encoding="utf-8")) if path is not None and has_record else None,
        }  # fmt: skip

    return {"command": invocation, "machine": about, "parts": [of(one) for one in outcomes]}


def _shown(words: Sequence[str]) -> str:
    return shlex.join(["python" if word == sys.executable else word for word in words])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu_report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="the parts to run (default: all; see --list)")
    parser.add_argument("--minutes", type=float, default=9.0, help="the most that the whole may take (default: 9)")
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu"), help="runs, logs and records")
    parser.add_argument("--output", type=Path, help="JSON file; the table goes beside it (default: FOLDER/gpu.json)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: rehearse the kit itself")
    parser.add_argument("--vllm-python", type=Path, help="interpreter of an environment with vLLM, to measure against")
    parser.add_argument("--list", action="store_true", help="print the parts and their commands")
    parser.add_argument("--wheels", action="store_true", help="print the packages that this machine lacks")
    return parser


def _print_wheels() -> int:
    absent = missing(requirement.name for requirement in wanted())
    peers = missing(PEERS)
    print(f"missing: {', '.join(absent) or 'nothing'}; peers to measure against: {', '.join(peers) or 'all there'}")
    for line in other_versions(wanted()):
        print(f"other version: {line}")
    if absent or peers:
        print(command([*absent, *peers]))
    return 1 if absent else 0


def main(arguments: Sequence[str]) -> int:
    """Runs the parts; 0 where all passed, 1 where one did not, 2 for a wrong call or no GPU."""
    parsed = _parser().parse_args(arguments)
    parts = gpu_parts(parsed.folder, parsed.device, parsed.vllm_python)
    names = [part.name for part in parts]
    for name in parsed.parts:
        if name not in names:
            hint = did_you_mean(name, names)
            print(f"gpu_report.py: unknown part '{name}'; allowed: {', '.join(names)}{hint}", file=sys.stderr)
            return 2
    parts = [part for part in parts if not parsed.parts or part.name in parsed.parts]
    if parsed.list:
        for part in parts:
            print(f"{part.name}: {part.what} (at most {part.seconds} s)")
            print("".join(f"    {_shown(words)}\n" for words in part.commands), end="")
        return 0
    if parsed.wheels:
        return _print_wheels()
    absent = missing(requirement.name for requirement in wanted())
    if absent:
        print(f"gpu_report.py: not installed: {', '.join(absent)}; --wheels has the commands", file=sys.stderr)
        return 2
    import torch

    if parsed.device == "cuda" and not torch.cuda.is_available():
        print("gpu_report.py: no GPU here; --device cpu rehearses the kit", file=sys.stderr)
        return 2
    return _report(parts, parsed)


def _report(parts: Sequence[Part], parsed: argparse.Namespace) -> int:
    folder: Path = parsed.folder
    output: Path = (folder / "gpu.json" if parsed.output is None else parsed.output).resolve()
    os.chdir(ROOT)  # a record should name files as the repository does
    for part in parts:  # a run that is there would be resumed
        shutil.rmtree(folder / part.name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    shown = [f"--device {parsed.device}"] * (parsed.device != "cuda") + list(parsed.parts)
    invocation = " ".join(["python tools/gpu_report.py", *shown])
    outcomes = run_parts(parts, folder, 60 * parsed.minutes)
    order = {part.name: number for number, part in enumerate(parts)}
    outcomes = sorted(outcomes, key=lambda one: order[one.part.name])
    about = describe(parsed.device)
    write_json(output, as_record(about, outcomes, invocation))
    output.with_suffix(".md").write_text(table(about, outcomes, invocation), encoding="utf-8")
    bad = [one.part.name for one in outcomes if one.state != "passed"]
    print(
        f"{len(outcomes) - len(bad)} of {len(outcomes)} passed; {output}" + (f"; not: {', '.join(bad)}" if bad else "")
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
