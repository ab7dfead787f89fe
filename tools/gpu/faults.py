"""Two faults on whatever device is here: a signal, and a kill, each followed by a resumption of the same run."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from megadistill.errors import ExitCode
from megadistill.files import write_json

ROOT = Path(__file__).resolve().parents[2]
_WAIT_S = 120


class Run:
    """A run of one process that would go on for long."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        words = [
            "train",
            "--config",
            "configs/smoke.yaml",
            f"run.dir={run_dir}",
            "train.save_every=3",
            "train.max_steps=100000",
        ]
        self.log = run_dir.with_suffix(".log").open("a", encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megadistill", *words], cwd=ROOT, stdout=self.log, stderr=self.log
        )

    def steps(self) -> list[int]:
        """The steps in metrics.jsonl."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [json.loads(line)["step"] for line in lines if line.endswith("}")]

    def saved(self) -> int:
        """The step of the latest checkpoint; 0 without one."""
        latest = self.run_dir / "checkpoints" / "latest"
        return int(latest.read_text(encoding="utf-8").strip().removeprefix("step_")) if latest.exists() else 0

    def wait_for_step(self, step: int) -> None:
        """Until the run has made and saved some steps. Raises SystemExit where it does not come to that."""
        deadline = time.monotonic() + _WAIT_S
        while max(self.steps(), default=0) < step or not self.saved():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"no step {step}: {self.log.name}")
            time.sleep(0.1)

    def end(self, number: int) -> int:
        """Sends a signal; the exit code."""
        self.process.send_signal(number)
        try:
            return self.process.wait(_WAIT_S)
        finally:
            self.log.close()


def check(run_dir: Path, number: signal.Signals) -> dict[str, object]:
    """One fault; what it cost."""
    run = Run(run_dir)
    try:
        run.wait_for_step(4)
    except SystemExit:
        run.end(signal.SIGKILL)
        raise
    code, last, saved = run.end(number), max(run.steps()), run.saved()
    again = Run(run_dir)
    try:
        again.wait_for_step(saved + 4)
    finally:
        again.end(signal.SIGTERM)
    steps = again.steps()
    is_whole = steps == list(range(1, len(steps) + 1))
    expected = ExitCode.STOPPED if number == signal.SIGTERM else -signal.SIGKILL
    passed = code == expected and is_whole and (saved == last if number == signal.SIGTERM else 0 < saved <= last)
    return {
        "fault": number.name, "exit_code": code, "last_step": last, "saved_step": saved,
        "resumed_to": max(steps), "passed": passed,
    }  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Runs both; 1 where one did not end as it should."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.faults", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="JSON file; a table goes beside it as .md")
    output: Path = parser.parse_args(arguments).output
    folder = Path(tempfile.mkdtemp(prefix="faults_"))
    rows = [check(folder / number.name.lower(), number) for number in (signal.SIGTERM, signal.SIGKILL)]
    shutil.rmtree(folder)
    lines = ["| fault | exit code | last step | saved | resumed to | |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = (row["fault"], row["exit_code"], row["last_step"], row["saved_step"], row["resumed_to"])
        lines.append("| " + " | ".join(map(str, cells)) + f" | {'as it should' if row['passed'] else 'WRONG'} |")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, {"rows": rows})
    output.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
