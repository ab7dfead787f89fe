"""Errors name what the user of a verb can set there, and nothing else."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megadistill.cli.main import VERBS, main
from megadistill.cli.settings import OPTIONS, line_of, names_of
from megadistill.config.fields import walk
from megadistill.data.tokenize import TOKENIZER_FILES
from megadistill.errors import ConfigError, DataError
from tests.support.tokenizers import byte_level

ROOT = Path(__file__).parents[2]
KEYS = [key for key, _ in walk() if "." in key]
GOOD = '{"instruction": "Say hello.", "output": "Hello."}\n'
CONFIG = '{"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, '
CONFIG += '"num_attention_heads": 4, "vocab_size": 600, "max_position_embeddings": 128}'


def _help(verb: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    return capsys.readouterr().out


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a verb; its only line of error, which names no key and no option that the verb does not have."""

    def run(verb: str, *arguments: object) -> str:
        shown = _help(verb, capsys)
        assert main([verb, *map(str, arguments)]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megadistill: ")]
        assert len(lines) == 1
        given = set(map(str, arguments))
        options = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", lines[0])) - {"--help"}
        assert options <= set(re.findall(r"--[a-z][\w-]*", shown)), lines[0]
        if "section.field=value" not in shown:
            assert not [key for key in KEYS if key in lines[0] and key not in given], lines[0]
        return lines[0]

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    byte_level(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(CONFIG, encoding="utf-8")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(file)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rows(path: Path, *lines: str) -> Path:
    path.write_text("".join(lines), encoding="utf-8")
    return path


def test_the_table_has_options_that_the_verbs_have(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, options in OPTIONS.items():
        assert verb in VERBS
        shown = _help(verb, capsys)
        for key, option in options.items():
            assert key in KEYS and re.search(rf"{option}\b", shown), (verb, key, option)


def test_settings_become_words() -> None:
    error = DataError("too long", setting="data.max_prompt_tokens, data.long_prompt")
    assert line_of(error, "train") == "too long (see data.max_prompt_tokens and data.long_prompt)"
    assert line_of(error, "generate") == "too long (see --max-prompt-tokens and --long-prompt)"
    assert line_of(error, "prepare") == "too long (see --max-prompt-tokens)"
    assert line_of(error, "verify") == "too long" and str(error) == "too long"
    assert line_of(ConfigError("no"), "train") == "no" and names_of(None, "prepare") == []


def test_prepare(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    data, out = rows(tmp_path / "rows.jsonl", GOOD, "{\n"), tmp_path / "out"
    prepare = ["prepare", data, out, "--tokenizer", model]
    assert "(see --max-prompt-tokens and --max-tokens)" in refused(*prepare, "--max-prompt-tokens", 600)
    assert "rows.jsonl:2: not valid JSON" in refused(*prepare) and "(see --skip-bad-rows)" in refused(*prepare)
    assert "--instruction-field" in refused(*prepare, "--instruction-field", "question")
    assert "(see --input-field)" in refused(*prepare, "--input-field", "question", "--skip-bad-rows")
    assert "(see --output-field)" in refused(*prepare, "--output-field", "answer", "--skip-bad-rows")
    assert "(see --tokenizer)" in refused("prepare", data, out, "--tokenizer", tmp_path / "modle")
    assert "did you mean" in refused("prepare", tmp_path / "row.jsonl", out, "--tokenizer", model)
    assert not out.exists()


def test_verify(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    verify = ["verify", model, model, "--greedy-tokens", 0]
    line = refused(*verify, "--text", rows(tmp_path / "rows.jsonl", GOOD), "--text-field", "nope")
    assert "field 'nope' is missing" in line and line.endswith("(see --text-field)")
    line = refused(*verify, "--text", rows(tmp_path / "bad.jsonl", GOOD, "{\n"))
    assert "bad.jsonl:2: not valid JSON" in line and "see" not in line
    assert "no such file or folder" in refused(*verify, "--text", tmp_path / "nothing.txt")


def test_generate(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    generate = ["generate", "--model", model, "--max-prompt-tokens", 60, "--max-new-tokens", 8, "--template", "plain"]
    line = refused(*generate, "--input", rows(tmp_path / "bad.jsonl", GOOD, "{\n"))
    assert "bad.jsonl:2: not valid JSON" in line and line.endswith("(see --skip-bad-rows)")
    long = rows(tmp_path / "long.jsonl", GOOD.replace("hello", "hello again " * 60))
    line = refused(*generate, "--input", long)
    assert "over the limit of 60" in line and line.endswith("(see --max-prompt-tokens and --long-prompt)")
    line = refused(*generate, "--input", rows(tmp_path / "good.jsonl", GOOD), "--tp-size", 3)
    assert "does not divide the number of processes" in line and line.endswith("(see --tp-size)")
    for name in TOKENIZER_FILES:
        (model / name).unlink(missing_ok=True)
    assert refused(*generate, "--input", long).endswith("(see --tokenizer)")


def test_evaluate(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    evaluate = ["evaluate", "--config", ROOT / "configs" / "base.yaml", "--model", model]
    settings = [f"run.dir={tmp_path / 'run'}", "model.student.path=x", "model.teacher.path=y", "data.max_tokens=100"]
    settings += ["data.max_prompt_tokens=60", "data.template=plain"]
    bad = rows(tmp_path / "bad.jsonl", GOOD, "{\n")
    assert refused(*evaluate, *settings, f"eval.path={bad}").endswith("(see data.skip_bad_rows)")
    line = refused(*evaluate, *settings, f"eval.path={bad}", "data.skip_bad_rows=true", "data.max_prompt_tokens=1")
    assert line.endswith("(see data.max_prompt_tokens)")


@pytest.mark.parametrize("verb", ["shard", "reshard"])
def test_sizes_that_do_not_fit(refused: Callable[..., str], verb: str, model: Path, tmp_path: Path) -> None:
    if verb == "shard":
        line = refused("shard", model, tmp_path / "out", "--tp-size", 3)
        assert "does not divide the 4 attention heads" in line and line.endswith("(see --tp-size)")
    else:
        assert "no such checkpoint" in refused(
            "reshard", tmp_path / "no", tmp_path / "out", "--tp-size=3", "--dp-size=1"
        )


def _raised_texts(source: str) -> Iterator[str]:
    """The text in the arguments of every ``raise Error(...)``, but that of keywords such as ``setting``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            for argument in node.exc.args:
                parts = [part.value for part in ast.walk(argument) if isinstance(part, ast.Constant)]
                yield "".join(part for part in parts if isinstance(part, str))


def test_the_text_of_an_error_is_found() -> None:
    source = (
        'if x:\n    raise ConfigError(f"{path}: set data.template" " now", setting="data.max_tokens")\nraise other\n'
    )
    assert list(_raised_texts(source)) == [": set data.template now"]


def test_errors_that_every_verb_can_meet_name_no_key_in_their_text() -> None:
    """They carry it as ``setting``, which the command line words. Other floors serve verbs that have keys."""
    shared = (
        "data",
        "models",
        "parallel",
        "decoding",
        "checkpoint",
        "evaluation",
        "launch",
        "engines",
        "observability",
    )
    named = re.compile("|".join(rf"(?<![\w.]){re.escape(key)}(?!\w)" for key in KEYS))
    faults = [
        f"{file.relative_to(ROOT)}: {text}"
        for package in shared
        for file in sorted((ROOT / "megadistill" / package).rglob("*.py"))
        for text in _raised_texts(file.read_text(encoding="utf-8"))
        if named.search(text)
    ]
    assert not faults, "\n".join(faults)


def test_every_setting_that_an_error_carries_is_a_key() -> None:
    named = re.compile(r"setting=\"([^\"]+)\"")
    for file in sorted((ROOT / "megadistill").rglob("*.py")):
        for settings in named.findall(file.read_text(encoding="utf-8")):
            assert set(settings.split(", ")) <= set(KEYS), f"{file.relative_to(ROOT)}: {settings}"


NUMBERS = {
    "prepare": {
        "--valid": "-1", "--max-prompt-tokens": "0", "--max-tokens": "0", "--min-reference-words": "-1",
        "--max-rows": "0", "--seed": "-1",
    },
    "generate": {
        "--max-prompt-tokens": "0", "--max-new-tokens": "0", "--temperature": "-1", "--top-k": "-1", "--top-p": "0",
        "--seed": "-1", "--batch-size": "0", "--tp-size": "0",
    },
    "verify": {"--tolerance": "-1", "--greedy-tokens": "-1", "--rows": "0", "--max-tokens": "0"},
    "shard": {"--tp-size": "0", "--dp-size": "0"},
    "reshard": {"--tp-size": "0", "--dp-size": "0"},
    "export": {"--max-shard-size": "0MB"},
}  # fmt: skip
REQUIRED = {
    "prepare": ["x", "y", "--tokenizer", "z"],
    "generate": ["--model", "x", "--input", "y"],
    "verify": ["x", "y"],
    "shard": ["x", "y", "--tp-size", "1"],
    "reshard": ["x", "y", "--tp-size", "1", "--dp-size", "1"],
    "export": ["x", "y"],
}


@pytest.mark.parametrize(("verb", "option"), [(verb, option) for verb in NUMBERS for option in NUMBERS[verb]])
def test_numbers_out_of_range_are_refused_at_once(
    refused: Callable[..., str], verb: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the parser: not even the names of models are looked at. Every numeric option of the verbs is in the list."""
    for text in (NUMBERS[verb][option], "nan", "inf", "many", ""):
        line = refused(verb, *REQUIRED[verb], f"{option}={text}")
        assert line.startswith(f"megadistill: megadistill {verb}: argument {option}: ") and " is not " in line


@pytest.mark.parametrize("verb", NUMBERS)
def test_no_numeric_option_is_missing_in_the_list(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = re.findall(r"(?m)^  (--[a-z-]+) (?:N|M|T|K|P|NATS|SIZE)\b", _help(verb, capsys))
    assert set(options) == set(NUMBERS[verb])
