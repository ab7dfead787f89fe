"""Epochs, the best checkpoint and early stopping in whole runs, and across resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megadistill.cli.main import main
from megadistill.evaluation.rouge import score_texts
from tests.support.runs import ROOT, run_layout, settings, weights

TIMES = ("time/", "memory/", "throughput/")


def _settings(assets: Path, *more: str) -> list[str]:
    """One epoch of 24 rows, two of them in a step; greedy answers get better and worse at this learning rate."""
    return settings(
        assets, "llama", "train.max_steps=null", "train.epochs=1", "train.eval_every=1", "train.eval_rows=4",
        f"data.valid_path={assets / 'data' / 'valid.jsonl'}", "checkpoint.keep_best=eval/rouge_l",
        "checkpoint.keep_last=1", "optim.lr=0.03", *more,
    )  # fmt: skip


def _numbers(run_dir: Path) -> list[dict[str, float]]:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(TIMES)} for line in lines]


def _summary(run_dir: Path) -> dict[str, Any]:
    return dict(json.loads((run_dir / "summary.json").read_text(encoding="utf-8")))


def _names(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "checkpoints").iterdir()}


@pytest.fixture(scope="module")
def whole(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    run_layout(2, [(str(out), _settings(assets, "parallel.tp_size=1"))])
    return out


def test_the_answers_of_each_validation_are_kept(whole: Path) -> None:
    """They are those that the metrics were made of."""
    files = {f"step_{line['step']:.0f}.jsonl": line["eval/rouge_l"] for line in _numbers(whole)}
    assert {path.name for path in (whole / "evaluations").iterdir()} == set(files)
    for name, rouge_l in files.items():
        rows = [json.loads(line) for line in (whole / "evaluations" / name).read_text(encoding="utf-8").splitlines()]
        assert len(rows) == 4 and all(row["prompt"] for row in rows)
        scores = score_texts([row["answer"] for row in rows], [tuple(row["references"]) for row in rows])
        assert scores.rouge_l == pytest.approx(rouge_l)


def test_the_best_validation_is_saved_named_and_kept(whole: Path) -> None:
    numbers, summary = _numbers(whole), _summary(whole)
    assert len(numbers) == summary["steps"] == 12 and numbers[-1]["epoch"] == summary["epochs"] == 1.0
    best = max(numbers, key=lambda line: line["eval/rouge_l"])
    assert 1 < best["step"] < 12, "the data of this test: validations that get better, then worse"
    assert summary["best_validation"] == {
        "metric": "eval/rouge_l", "value": best["eval/rouge_l"], "step": best["step"],
        "checkpoint": f"step_{best['step']:.0f}",
    }  # fmt: skip
    assert _names(whole) == {f"step_{best['step']:.0f}", "step_12", "best", "latest"}
    assert (whole / "checkpoints" / "best").read_text(encoding="utf-8") == f"step_{best['step']:.0f}\n"


def test_a_resumed_run_knows_its_best(assets: Path, whole: Path, tmp_path: Path) -> None:
    """Back to the best checkpoint, which a run that died then left behind: the same numbers, names and weights."""
    best, run_dir = _summary(whole)["best_validation"]["step"], tmp_path / "died"
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step_12")
    (run_dir / "summary.json").unlink()
    (run_dir / "checkpoints" / "latest").write_text(f"step_{best}\n", encoding="utf-8")
    (run_dir / "checkpoints" / "best").unlink()  # died between the two names
    run_layout(2, [(str(run_dir), _settings(assets, "parallel.tp_size=1"))])
    assert _numbers(run_dir) == _numbers(whole) and _names(run_dir) == _names(whole)
    assert _summary(run_dir)["best_validation"] == _summary(whole)["best_validation"]
    ours, theirs = weights(run_dir, 12), weights(whole, 12)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    state = [torch.load(run / "checkpoints" / "step_12" / "trainer.pt", weights_only=True) for run in (run_dir, whole)]
    assert state[0]["best_validation"] == state[1]["best_validation"]


def test_a_run_that_starts_elsewhere_has_its_own_best(assets: Path, whole: Path, tmp_path: Path) -> None:
    start = f"train.resume={whole / 'checkpoints' / 'best'}"
    run_layout(2, [(str(tmp_path / "run"), _settings(assets, "parallel.tp_size=1", start))])
    first = _summary(whole)["best_validation"]["step"] + 1
    assert [line["step"] for line in _numbers(tmp_path / "run")] == list(range(first, 13))
    found = _summary(tmp_path / "run")["best_validation"]
    assert found["step"] >= first and found["checkpoint"] in _names(tmp_path / "run")


def test_a_run_stops_early_and_stays_so(
    assets: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the step that the undisturbed run's validations say; a resume before it stops at the same one."""
    best = _summary(whole)["best_validation"]["step"]
    values = [line["eval/rouge_l"] for line in _numbers(whole)]
    stop = next(step for step in range(2, 12) if values[step - 1] <= max(values[: step - 1]))
    words = _settings(assets, "parallel.tp_size=1", "train.early_stopping=1")
    run_layout(2, [(str(tmp_path / "run"), words)])
    summary = _summary(tmp_path / "run")
    assert summary["stopped_early"] and summary["steps"] == stop
    assert _numbers(tmp_path / "run") == _numbers(whole)[:stop]
    assert f"step_{stop}" in _names(tmp_path / "run") and best >= stop - 1
    before = (tmp_path / "run" / "summary.json").read_bytes()
    run_layout(2, [(str(tmp_path / "run"), words)])
    assert (tmp_path / "run" / "summary.json").read_bytes() == before
    assert len(_numbers(tmp_path / "run")) == stop
    # The verb finds out without a model: none is there any more.
    words = [word.replace("parallel.tp_size=1", "parallel.tp_size=auto") for word in words]
    config = ["--config", str(ROOT / "configs" / "base.yaml"), f"run.dir={tmp_path / 'run'}"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("megadistill.training.setup._engines", None)
        assert main(["train", *config, *words]) == 0
        said = capsys.readouterr().out
        assert f"nothing to do: step {stop} of" in said and "Increase train.early_stopping" in said
        done = [f"run.dir={whole}", *_settings(assets)]
        assert main(["train", *config[:2], *done]) == 0
        assert "nothing to do: all 12 steps" in capsys.readouterr().out


def test_sft_has_no_numbers_of_gate_and_mask(assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    more = ("loss.dac_kl=0", "loss.span=0", "generation.mode=dataset", "train.max_steps=1", "data.prompts_path=null",
            "data.prompts_ratio=0", "parallel.tp_size=1")  # fmt: skip
    run_layout(1, [(str(tmp_path / "run"), settings(assets, "llama", *more))])
    (line,) = _numbers(tmp_path / "run")
    assert {"loss", "loss/sft", "lr", "epoch"} <= set(line) and not {"kept_mass", "gate/lower", "gate/upper"} & set(
        line
    )
    said = capfd.readouterr().out
    assert f"SFT of {assets / 'llama' / 'student'}" in said and "no teacher" not in said
