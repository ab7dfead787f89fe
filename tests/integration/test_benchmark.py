"""tools/benchmark.py on problems that are small enough to test: the whole path, not the numbers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPTIONS = ("span log", "truncate", "none", "entropy", "upper 0.98")


def benchmark(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/benchmark.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_loss(tmp_path: Path) -> None:
    sizes = ["--tokens", "48", "--vocab", "600", "--hidden", "16", "--tp", "1", "2", "--rounds", "1"]
    result = benchmark("loss", *sizes, "--device", "cpu", "--output", str(tmp_path / "loss.json"))
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "loss.json").read_text(encoding="utf-8"))
    assert "tools/benchmark.py loss --tokens 48" in record["command"] and record["machine"]["cores"]
    rows = [row for row in record["rows"] if not row["skipped"]]
    for tp_size in (1, 2):
        mine = [row for row in rows if row["case"]["tp_size"] == tp_size and row["name"].startswith("megadistill")]
        assert {row["work"] for row in mine} == {"ce+kl", "full", *OPTIONS}
    for row in rows:
        assert row["seconds"] > 0 and row["ratio"] > 0
        if row["case"]["tp_size"] == 1 and row["work"] != "products":
            assert row["error"] < 1e-4, row["name"]  # every contender computes its ``work``
    assert "| floor: the four products | products |" in result.stdout
    assert (tmp_path / "loss.md").read_text(encoding="utf-8") in result.stdout + "\n"


def test_rollout(tmp_path: Path) -> None:
    sizes = ["--vocab", "400", "--rows", "3", "--prompt-tokens", "8", "--new-tokens", "6", "--rounds", "1"]
    result = benchmark("rollout", *sizes, "--models", "tiny", "--output", str(tmp_path / "rollout.json"))
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "rollout.json").read_text(encoding="utf-8"))
    names = [row["name"] for row in record["rows"]]
    assert "megadistill rollout" in names and "transformers generate" in names and len(names) == 7
    assert all(row["milliseconds"] > 0 and row["of_rollout"] > 0 for row in record["rows"])
    assert record["operations"] == {"layer": 18, "outside": 7, "sampling": 17}
    (found,) = record["parallel"]
    # Two float64 numbers of each rank gathered, one integer reduced, a row and token.
    assert found["sampling_bytes"] == 40 and found["zero3_over_zero0"] > 0
    assert (tmp_path / "rollout.md").read_text(encoding="utf-8") in result.stdout + "\n"


def test_problems_that_are_too_large_name_their_reason(tmp_path: Path) -> None:
    sizes = ["--tokens", "48", "--vocab", "600", "--hidden", "16", "--tp", "1", "--rounds", "1", "--no-error"]
    result = benchmark("loss", *sizes, "--device", "cpu", "--memory-gib", "0.000001", "--max-tera-flops", "1e-9")
    assert result.returncode == 0, result.stderr
    assert "| dense, eager | full | about 0 GiB |" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["los"], "unknown verb 'los'; allowed: loss"),
        (["rollout", "--rows", "x"], "'x' is not a whole number >= 1"),
        (["loss", "--rounds", "0"], "'0' is not a whole number >= 1"),
        (["loss", "--tokens", "x"], "'x' is not a whole number >= 1"),
        (["loss", "--device", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_exits_2(arguments: list[str], message: str) -> None:
    result = benchmark(*arguments)
    assert result.returncode == 2 and message in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_save_measures_the_three_ways(tmp_path: Path) -> None:
    output = tmp_path / "save.json"
    done = benchmark("save", "--rounds", "1", "--steps", "1", "--vocab", "1024", "--output", str(output))
    assert done.returncode == 0, done.stderr
    kinds = json.loads(output.read_text(encoding="utf-8"))["kinds"]
    assert list(kinds) == ["none", "asynchronous", "waiting"]
    assert all(len(row["seconds"]) == 1 and row["seconds"][0] > 0 for row in kinds.values())
    assert "| asynchronous |" in output.with_suffix(".md").read_text(encoding="utf-8")
