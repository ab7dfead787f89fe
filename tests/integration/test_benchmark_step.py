"""`tools/benchmark.py step` on models that are small enough to test: the whole path, not the numbers."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRG = {"megadistill, SCRG", "megadistill, SCRG, bf16 teacher", "megadistill, SCRG + SFT on references"}
OURS = {"megadistill, plain on-policy KL", *SCRG}
TRL = {"TRL DistillationTrainer", "TRL DistillationTrainer, bf16 teacher"}


def benchmark(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/benchmark.py", "step", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_step(tmp_path: Path) -> None:
    sizes = ["--vocab", "256", "--rows", "2", "--prompt-tokens", "8", "--new-tokens", "8", "--rounds", "1"]
    result = benchmark(*sizes, "--models", "tiny", "--output", str(tmp_path / "step.json"))
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))
    assert "tools/benchmark.py step --vocab 256" in record["command"] and record["machine"]["cores"]
    rows = {row["name"]: row for row in record["rows"]}
    assert rows.keys() == OURS | TRL
    has_trl = importlib.util.find_spec("trl") is not None
    for name, row in rows.items():
        if name in TRL and not has_trl:
            assert row["skipped"] == "trl is not installed" and row["cpu_ms"] is None
            continue
        assert not row["skipped"], result.stderr
        assert row["cpu_ms"] > 0 and len(row["rounds_ms"]) == 1
        assert (row["ratio"] is not None and row["ratio"] > 0) is has_trl
        assert row["phases_ms"]["rollout"] > 0 and row["facts"]["length"] == 8  # no row ended early
    for name in SCRG:
        assert rows[name]["facts"]["corrected_fraction"] > 0 and rows[name]["facts"]["error_position"] >= 0
        for text in ("student", "corrected"):
            assert 0.5 < rows[name]["facts"][f"distinct_1_{text}"] <= 1
    assert "| megadistill, SCRG | " in result.stdout
    assert (tmp_path / "step.md").read_text(encoding="utf-8") in result.stdout + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "'0' is not a whole number >= 1"),
        (["--vocab", "2"], "'2' is not a whole number >= 16"),
        (["--only", "GKD"], "--only GKD: not in any name; allowed: TRL DistillationTrainer; "),
    ],
)
def test_bad_input_exits_2(arguments: list[str], message: str) -> None:
    result = benchmark(*arguments)
    assert result.returncode == 2 and message in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
