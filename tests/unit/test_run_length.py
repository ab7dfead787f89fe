"""How long a run is, which validation is its best one, and what it says at its start and its end."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megadistill.checkpoint.manifest import MANIFEST, find_checkpoint, point_to_best
from megadistill.checkpoint.model_folder import model_folder
from megadistill.checkpoint.writer import Keep, _remove_old
from megadistill.config.load import dump_resolved, load_config
from megadistill.config.schema import RunConfig
from megadistill.data.encode import TokenizedExample
from megadistill.errors import CheckpointError, ConfigError, DataError
from megadistill.training.hooks.best import Best, BestValidation, check_best
from megadistill.training.hooks.progress import progress_words
from megadistill.training.length import RunLength
from megadistill.training.words import data_warnings, end_lines, length_words, run_warnings

ROOT = Path(__file__).resolve().parents[2]
BASE = ["run.dir=runs/mine", "model.teacher.path=t", "model.student.path=s"]

ROWS = [TokenizedExample(0, (1, 2), (3,), ("x",), "p"), TokenizedExample(1, (1,), (4,), ("y",), "p")]


def config_of(*overrides: str) -> RunConfig:
    return load_config(ROOT / "configs" / "base.yaml", [*BASE, *overrides])


def length_of(rows: int, *overrides: str, prompts: int = 0) -> RunLength:
    data: Any = SimpleNamespace(train=range(rows), prompts=range(prompts))
    return RunLength.of(config_of(*overrides), data)


def test_steps_come_from_one_of_the_two_keys(tmp_path: Path) -> None:
    assert length_of(100).max_steps == 1000
    assert length_of(100, "train.max_steps=7", "train.epochs=null").max_steps == 7
    with pytest.raises(ConfigError, match="train.epochs=2 and train.max_steps=7 are both set.*the other one to null"):
        config_of("train.max_steps=7", "train.epochs=2")
    for overrides in ((), ("train.epochs=2.5",), ("train.max_steps=3",)):
        dump_resolved(config_of(*overrides), tmp_path / "resolved.yaml")
        assert load_config(tmp_path / "resolved.yaml") == config_of(*overrides)
    assert config_of().train.max_steps == 1000 and config_of("train.epochs=1").train.max_steps is None


@pytest.mark.parametrize(
    ("rows", "epochs", "steps"),
    [(64, "1", 4), (65, "1", 5), (64, "2.5", 10), (3, "1", 1), (3, "0.1", 1), (160, "0.1", 1)],
)
def test_epochs_are_passes_over_the_training_rows(rows: int, epochs: str, steps: int) -> None:
    assert length_of(rows, f"train.epochs={epochs}").max_steps == steps


def test_prompts_without_references_are_no_part_of_an_epoch() -> None:
    more = ("data.prompts_path=x", "data.prompts_ratio=0.5", "train.epochs=2")
    length = length_of(80, *more, prompts=1000)
    assert (length.max_steps, length.steps_per_epoch, length.epochs(5)) == (20, 10, 0.5)
    assert length_words(length, 16) == "20 steps of 16 examples, an epoch is 10 steps"
    assert length_words(length_of(946, "train.epochs=3"), 16).endswith("an epoch is 59.1 steps")


def test_the_best_validation_survives_a_resume() -> None:
    config = config_of(
        "checkpoint.keep_best=eval/rouge_l", "train.eval_every=1", "train.early_stopping=2", "data.valid_path=v"
    )
    best, again = Best(config, ROWS), Best(config, ROWS)
    assert best.state_dict() == {}
    best.validated(0, {"eval/rouge_l": 99.0})  # before the first step: there is no checkpoint
    for step, value in ((1, math.nan), (2, 10.0), (3, 12.0), (4, 12.0)):
        best.validated(step, {"eval/rouge_l": value, "eval/nll": 1.0})
    assert (
        best.found == replace(best.found, value=12.0, step=3, num_since=1) and best.kept_step == 3 and not best.is_over
    )
    again.load_state_dict(best.state_dict() | {"gate": {}})
    again.validated(5, {"eval/rouge_l": 11.0})
    assert again.is_over and again.summary()["stopped_early"]
    assert again.summary()["best_validation"]["checkpoint"] == "step_3"
    by_likelihood = Best(config_of("checkpoint.keep_best=eval/nll", "train.eval_every=1", "data.valid_path=v"), ROWS)
    by_likelihood.load_state_dict(best.state_dict())
    assert by_likelihood.found.step == 0, "another metric has another best"
    for step, value in ((1, 3.0), (2, 2.0), (3, 2.5)):
        by_likelihood.validated(step, {"eval/nll": value})
    assert by_likelihood.kept_step == 2 and not by_likelihood.is_over


def test_a_best_of_other_validation_rows_does_not_count(capsys: pytest.CaptureFixture[str]) -> None:
    """data.valid_path and train.eval_rows may change when a run is continued; the two scores mean different things."""
    words = ["checkpoint.keep_best=eval/nll", "train.eval_every=1", "data.valid_path=v"]
    best = Best(config_of(*words), ROWS)
    best.validated(1, {"eval/nll": 0.5})
    for more, rows in (((), ROWS[:1]), (("train.eval_rows=1",), ROWS)):
        again = Best(config_of(*words, *more), rows)
        again.load_state_dict(best.state_dict())
        assert again.kept_step is None and not again.continues(best.found)
        assert "step 1, was by eval/nll on other rows; it does not count any more" in capsys.readouterr().out
        again.validated(2, {"eval/nll": 0.9})
        assert again.kept_step == 2


def test_without_the_key_nothing_is_kept() -> None:
    best = Best(config_of(), ROWS)
    best.validated(1, {"eval/nll": 1.0})
    assert best.kept_step is None and best.found.step == 1 and best.summary()["best_validation"]["checkpoint"] is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoint.keep_best=eval/nll"], "checkpoint.keep_best=eval/nll needs validations: set train.eval_every"),
        (["train.early_stopping=2"], "train.early_stopping=2 needs checkpoint.keep_best"),
        (["checkpoint.keep_best=nll"], "must be eval/nll | eval/rouge_l | eval/exact_match, or null"),
    ],
)
def test_keys_that_need_each_other(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(*overrides)
    assert message in str(caught.value)


def test_validation_rows_without_references_cannot_be_compared() -> None:
    config = config_of("checkpoint.keep_best=eval/nll", "train.eval_every=1", "data.valid_path=v")
    rows: Any = [SimpleNamespace(references=())]
    with pytest.raises(DataError, match="v: none of the first train.eval_rows=64 rows has a reference"):
        check_best(config, rows)
    check_best(config, [*rows, SimpleNamespace(references=("x",))])
    check_best(config_of(), rows)


def test_the_best_checkpoint_has_a_name_and_stays(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in range(1, 6):
        (folder / f"step_{step}" / "hf").mkdir(parents=True)
        (folder / f"step_{step}" / MANIFEST).touch()
    (folder / "latest").write_text("step_5\n", encoding="utf-8")
    point_to_best(folder, 2)
    assert find_checkpoint(folder / "best") == folder / "step_2" and find_checkpoint(folder / "latest").name == "step_5"
    assert model_folder(str(folder / "best")) == str(folder / "step_2" / "hf")
    assert find_checkpoint(tmp_path) == find_checkpoint(folder) == folder / "step_5"
    _remove_old(folder, 5, Keep(1), 2)
    assert sorted(path.name for path in folder.glob("step_*")) == ["step_2", "step_5"]
    (folder / "best").write_text("../..", encoding="utf-8")
    with pytest.raises(CheckpointError, match="best is damaged"):
        find_checkpoint(folder / "best")
    point_to_best(folder, None)
    point_to_best(folder, None)
    assert not (folder / "best").exists()


def test_what_was_dropped_and_cut_is_said_in_words() -> None:
    report = {"train/rows": 1023, "train/dropped": 77, "train/truncated_responses": 216, "train/skipped": 2,
              "prompts/rows": 5, "prompts/without_reference": 5, "valid/rows": 10, "valid/without_reference": 4,
              "valid/truncated_prompts": 1, "train/without_reference": 23, "train/other": 3}  # fmt: skip
    assert list(filter(None, data_warnings(config_of("data.long_prompt=truncate"), report))) == [
        "77 of 1100 (7 %) training rows were dropped: their prompts are over data.max_prompt_tokens=256",
        "216 of 1000 (22 %) training responses are longer than data.max_tokens=512 and were cut: they teach no end",
        "2 malformed training rows were skipped (data.skip_bad_rows=true)",
        "4 of 10 (40 %) validation rows have no reference: no score counts them",
        "1 of 10 (10 %) validation prompts are over data.max_prompt_tokens=256 and lost their beginning "
        "(data.long_prompt=truncate)",
        "train/other: 3",
    ]
    ended = " ".join(data_warnings(config_of("data.long_prompt=truncate_end"), report))
    assert "lost their end, which asks for the answer (data.long_prompt=truncate_end)" in ended
    sft = config_of("loss.dac_kl=0", "loss.span=0", "generation.mode=dataset")
    assert any(
        "23 of 1023 (2 %) training rows have no reference: the gate learns nothing" in line
        for line in data_warnings(config_of("loss.gate_objective=student"), report)
    )
    assert "23 of 1023 (2 %) training rows have no reference: SFT learns nothing from them" in data_warnings(
        sft, report
    )


def test_rows_that_a_mode_cannot_use_are_said() -> None:
    prompts = ("data.prompts_path=p.jsonl", "data.prompts_ratio=0.25")
    said = list(run_warnings(config_of("generation.mode=dataset", *prompts), length_of(100), 5, (1, 0)))
    assert said == [
        "generation.mode=dataset computes no loss on rows of data.prompts_path, 25 % of every batch "
        "(data.prompts_ratio)"
    ]
    assert not list(run_warnings(config_of("generation.mode=mixed", *prompts), length_of(100), 5, (1, 0)))


def test_what_is_unusual_about_a_run_is_said() -> None:
    config, short = config_of(), ("train.max_steps=20",)
    few = length_of(3, *short)
    assert list(run_warnings(config, few, 20, (5_000_000, 1_000_000))) == [
        "the student (5.0M parameters) is larger than its teacher (1.0M)",
        "3 rows with a global batch of 16: every row is used 5 or 6 times a step",
    ]
    assert "every row is used 4 times a step" in next(run_warnings(config, length_of(4, *short), 20, (5, 0)))
    long = length_of(100, "train.max_steps=500")
    assert ["train.save_every=0" in text for text in run_warnings(config, long, 500, (1, 2))] == [True]
    assert not list(run_warnings(config, long, 100, (1, 2)))
    assert not list(run_warnings(config_of("train.save_every=50"), long, 500, (1, 2)))


def test_the_end_says_how_good_it_got_and_what_comes_next() -> None:
    run = Path("runs/my run")
    lines = list(end_lines(config_of(), run, 9, {}, BestValidation("eval/nll")))
    assert "data.valid_path and train.eval_every" in lines[0]
    assert (
        lines[1]
        == "evaluate it: megadistill evaluate --config 'runs/my run/resolved.yaml' --model 'runs/my run' --suite FILE"
    )
    assert lines[2] == "export it:   megadistill export 'runs/my run' 'exported/my run'"
    config = config_of(
        "checkpoint.keep_best=eval/nll", "train.eval_every=1", "data.valid_path=v.jsonl", "parallel.tp_size=2"
    )
    scores = {"eval/nll": 2.0, "eval/rouge_l": 12.34, "eval/exact_match": 5.0}
    lines = list(end_lines(config, Path("runs/a"), 9, scores, BestValidation("eval/nll", 1.5, 4, 2)))
    assert lines == [
        "validation at step 9: NLL 2 nats per token, ROUGE-L 12.3, exact match 5.0 %; the best by eval/nll: 1.5 at "
        "step 4, runs/a/checkpoints/best",
        "evaluate it: megadistill evaluate --config runs/a/resolved.yaml parallel.tp_size=auto --model "
        "runs/a/checkpoints/best --suite valid=v.jsonl",
        "export it:   megadistill export runs/a/checkpoints/best exported/a",
    ]


def test_the_numbers_beside_the_bar_say_of_which_steps_they_are() -> None:
    entries = [{"loss": loss, "lr": 1e-4, "throughput/tokens_per_s": 100.0, "epoch": 0.5} for loss in (1.0, 2.0)]
    assert progress_words(10, entries) == "loss 1.5000 (mean of steps 9 to 10), lr 1.00e-04, 100 tokens/s, epoch 0.50"
    assert progress_words(10, entries[:1]).startswith("loss 1.0000, lr")
