"""Keys by the names of other trainers are answered with ours, and our own keys are still recognized."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadistill.cli.main import main
from megadistill.config import load_config
from megadistill.config.aliases import TABLES, Name
from megadistill.config.fields import walk
from megadistill.config.load import unknown_key
from megadistill.config.section import section_type
from megadistill.errors import ConfigError

# Keys of the tables that the schema does not have yet; to be emptied when they are there.
KEYS = {key for key, _ in walk()}
LEAVES = [key for key, field in walk() if section_type(field) is None]
ROWS = [row for table in TABLES.values() for row in table]
SECTIONS = ["", "train.", "optim.", "model.", "data.", "trainer."]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("run: {dir: out}\nmodel: {teacher: {path: big}, student: {path: small}}\n", encoding="utf-8")
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_all_targets_exist() -> None:
    targets = {key for row in ROWS for key in row.keys}
    assert targets <= KEYS


def test_no_name_is_there_twice_in_a_table() -> None:
    for title, rows in TABLES.items():
        names = [row.name for row in rows]
        assert len(names) == len(set(names)), title


def test_every_name_has_a_key_or_a_reason() -> None:
    assert all(row.keys or row.word for row in ROWS)


@pytest.mark.parametrize("row", [row for row in ROWS if "." not in row.name], ids=lambda row: row.name)
def test_a_name_under_any_section_is_answered(row: Name) -> None:
    for section in SECTIONS:
        if section + row.name not in KEYS | {"optim.beta"}:  # a slip of optim.betas
            message = unknown_key(section + row.name)
            assert any(key in message for key in row.keys) or (not row.keys and row.word in message), message


@pytest.mark.parametrize("row", [row for row in ROWS if "." in row.name], ids=lambda row: row.name)
def test_a_name_with_dots_is_answered(config: Path, row: Name) -> None:
    message = error_of(config, f"{row.name}=1")
    assert f"{row.name}: unknown key; {row.hint}" in message, message


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        # What a new user was told wrongly (friction log of the tool tried as a new user would).
        ("train.learning_rate=1e-4", "did you mean optim.lr?"),
        ("optim.learning_rate=1e-4", "did you mean optim.lr?"),
        ("learning_rate=1e-4", "did you mean optim.lr?"),
        ("train.save_steps=1", "did you mean train.save_every?"),
        ("train.eval_steps=1", "did you mean train.eval_every?"),
        ("train.logging_steps=1", "did you mean train.log_every?"),
        ("train.output_dir=x", "did you mean run.dir?"),
        ("train.report_to=wandb", "did you mean run.trackers?"),
        ("train.bf16=true", "model.student.dtype=bf16"),
        ("model.lora.r=8", "megadistill merge"),
        ("model.student_path=x", "did you mean model.student.path?"),
        ("teacher_path=x", "did you mean model.teacher.path?"),
        ("train.gradient_accumulation_steps=8", "did you mean train.global_batch_size?"),
        ("train.num_epochs=3", "did you mean train.epochs?"),
        ("train.warmup_steps=3", "did you mean optim.warmup_steps?"),
        ("eval.seed=3", "did you mean eval.seeds?"),
        ("optim.beta=[0.9, 0.99]", "did you mean optim.betas?"),
        ("train.learnig_rate=3", "did you mean optim.lr?"),
        ("model={use_peft: true}", "megadistill merge"),
        ("critic.optim.lr=1e-5", "there is no critic"),
        ("tokenizer={_component_: x, path: y}", "did you mean model.tokenizer?"),
        ("template=qwen", "did you mean data.template?"),
    ],
)
def test_what_people_type(config: Path, typed: str, meant: str) -> None:
    assert meant in error_of(config, typed)


def test_a_file_of_another_trainer(tmp_path: Path) -> None:
    path = tmp_path / "sft.yaml"
    path.write_text("model_name_or_path: meta/x\nstage: sft\nlearning_rate: 1.0e-4\n", encoding="utf-8")
    assert "model_name_or_path: unknown key; did you mean model.student.path?" in error_of(path)


@pytest.mark.parametrize("key", LEAVES)
def test_a_slip_in_our_own_keys_is_still_recognized(key: str) -> None:
    section, _, name = key.rpartition(".")
    slips = {f"{section}.{name[:-1]}", f"{section}.{name}s", f"{section}.{name[:2]}{name[3:]}"}
    # Of a short one nothing is left by which it could be told from others (top_k, top_p).
    for slip in slips - KEYS if len(name) > 5 else ():
        assert f"did you mean {key}?" in unknown_key(slip), slip


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["--optim.lr", "1e-4"], "--optim.lr is a setting; write optim.lr=1e-4"),
        (["--optim.lr=1e-4"], "--optim.lr is a setting; write optim.lr=1e-4"),
        (["--optim.lr"], "write optim.lr=VALUE"),
        (
            ["--learning_rate", "1e-4"],
            "written section.field=value; --learning_rate: unknown key; did you mean optim.lr?",
        ),
        (["--learning-rate=1e-4"], "did you mean optim.lr?"),
        (["--nothing-like-it"], "written section.field=value"),
        (["--confg", "x"], "unrecognized arguments: --confg; did you mean --config?"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_a_setting_as_an_option(
    verb: str, arguments: list[str], meant: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "--config", str(config), *arguments]) == 2
    assert meant in capsys.readouterr().err


def test_a_verb_without_settings_proposes_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "a", "b", "--dtyp", "bf16"]) == 2
    assert "unrecognized arguments: --dtyp; did you mean --dtype?" in capsys.readouterr().err
    assert main(["export", "a", "b", "--learning_rate", "1"]) == 2
    assert "section.field" not in capsys.readouterr().err


def test_help_names_the_page_of_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "docs/configuration.md" in capsys.readouterr().out
