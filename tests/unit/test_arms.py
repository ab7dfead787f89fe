"""``tools/benchmark.py arms``: which runs it asks for, what it remembers, and how updates and time are made equal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.benchmarks import arms

PLAIN_S, FULL_S = 0.25, 1.0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Every training as its settings. A run without span and SCRG takes a quarter of the time."""
    made: list[dict[str, str]] = []

    def call(arguments: list[str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        if arguments[0] == "train":
            settings = dict(setting.split("=", 1) for setting in arguments[3:])
            made.append(settings)
            run = Path(settings["run.dir"])
            run.mkdir(parents=True)
            (run / "summary.json").touch()
            step = json.dumps({"time/step_s": PLAIN_S if settings.get("loss.span") == "0" else FULL_S})
            (run / "metrics.jsonl").write_text(f"{step}\n" * int(settings["train.max_steps"]), encoding="utf-8")
            return
        models = [argument.split("=", 2) for argument in arguments if argument.startswith("--model=")]
        measures = {"rouge_l": 90.0, "exact_match": 50.0}
        sampled = {name: {"mean": value} for name, value in measures.items()}
        result = {"greedy": measures, "sampled": sampled, "nll": 0.5}
        output = Path(arguments[arguments.index("--output") + 1])
        results = {name: {"valid": result, "test": result} for _, name, _ in models}
        output.write_text(json.dumps({"results": results}), encoding="utf-8")

    monkeypatch.setattr(arms, "_call", call)
    monkeypatch.setattr(arms, "make_assets", lambda *_, **__: None)
    return made


def test_equal_updates_and_equal_time(
    tmp_path: Path, calls: list[dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.json"
    command = ["--only", "full", "forward KL", "--seeds", "3", "4", "--rounds", "2", "--updates", "40"]
    assert arms.main([*command, "--folder", str(tmp_path / "runs"), "--output", str(output)]) == 0
    record = json.loads(output.read_text(encoding="utf-8"))
    full, plain = (record["seeds"]["3"][name] for name in ("full", "forward KL"))
    assert (full["updates"]["updates"], full["time"]["updates"]) == (40, 24)
    assert (plain["updates"]["updates"], plain["time"]["updates"]) == (40, 96)
    assert plain["updates"]["time"] == pytest.approx(0.25) and plain["time"]["time"] == full["time"]["time"] == 0.6
    assert {settings["run.seed"] for settings in calls} == {"3", "4"}
    costs = [settings for settings in calls if settings["train.max_steps"] == str(arms.COST_UPDATES)]
    assert [settings.get("loss.span") for settings in costs] == [None, "0"] * 2, "in turn"
    assert len(calls) == 4 + 4 + 4
    assert (
        "forward KL" in capsys.readouterr().out
        and "nll" in output.with_suffix(".md").read_text(encoding="utf-8").lower()
    )
    assert arms.main([*command, "--folder", str(tmp_path / "runs")]) == 0
    assert len(calls) == 12, "nothing is trained again"


def test_an_arm_of_ones_own_and_one_that_is_none(
    tmp_path: Path, calls: list[dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--arm", "hot=loss.temperature=4 loss.span=0", "--rounds", "1", "--seeds", "0", "--folder", str(tmp_path)]
    assert arms.main(["--only", "full", "hot", *more]) == 0
    assert any(settings.get("loss.temperature") == "4" for settings in calls)
    assert arms.main(["--only", "cold", *more]) == 2
    assert "--only cold: no such arm; allowed: full" in capsys.readouterr().err
