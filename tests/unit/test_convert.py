"""Data preparation: the same files from any number of workers, and a report that adds up."""

import datetime
import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest

from megadistill.cli.main import main
from megadistill.data.convert import ConvertOptions, convert_share, report_text, write_converted
from megadistill.data.dataset import load_examples
from megadistill.data.prompts import PromptSettings
from megadistill.data.tokenize import load_tokenizer
from megadistill.errors import ConfigError, DataError
from tests.support.chats import TEMPLATES
from tests.support.tokenizers import byte_level

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture
def source(tmp_path):
    rows = [{"instruction": f"Count to {n} — é", "output": " ".join(map(str, range(n)))} for n in range(40)]
    rows += [dict(rows[3]), {"instruction": "dog " * 300, "output": "x"}, {"instruction": "many", "output": ["a", "b"]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "broken\n", encoding="utf-8")
    return path


def options(source, **changes):
    limits = {name: changes.pop(name) for name in ("max_prompt_tokens", "max_tokens") if name in changes}
    prompts = PromptSettings("plain", **{"max_prompt_tokens": 60, "max_tokens": 160, **limits})
    return ConvertOptions(str(source), prompts=prompts, **{"skip_bad_rows": True, "num_valid": 5, **changes})


def convert(source, tokenizer, target, num_shares=1, **changes):
    chosen = options(source, **changes)
    shares = [convert_share(chosen, tokenizer, share=share, num_shares=num_shares) for share in range(num_shares)]
    return write_converted(shares, chosen, target)


def test_files_do_not_depend_on_the_number_of_workers(source, tokenizer, tmp_path):
    for num_shares in (1, 3):
        convert(source, tokenizer, tmp_path / str(num_shares), num_shares)
    for name in ("train.jsonl", "valid.jsonl", "report.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def test_every_row_is_accounted_for(source, tokenizer, tmp_path):
    report = convert(source, tokenizer, tmp_path / "out")
    assert report == json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8")) | {
        "options": report["options"]
    }
    assert (report["num_rows"], report["num_bad_rows"]) == (44, 1)
    assert report["left_out"] == {"prompt over 60 tokens": 1, "prompt seen before": 1}
    train, valid = (load_examples(tmp_path / "out" / f"{name}.jsonl").examples for name in ("train", "valid"))
    assert (len(train), len(valid)) == (36, 5)
    assert report["splits"]["train"]["num_rows"] == 36
    assert not {row.instruction for row in train} & {row.instruction for row in valid}
    merged = {row.instruction: row.references for row in [*train, *valid]}
    kept = {row.instruction: row.references for row in load_examples(source, skip_bad_rows=True).examples[:40]}
    assert merged == kept | {"many": ("a", "b")}
    without = sum(split["num_without_references"] for split in report["splits"].values())
    assert without == 1
    text = report_text(report)
    assert "rows.jsonl: 43 instruction rows (instruction, output); template plain" in text
    assert "bad rows skipped: 1, the first: " in text


def test_filters(source, tokenizer, tmp_path):
    short = convert(source, tokenizer, tmp_path / "a", min_reference_words=30, num_valid=0)
    assert short["splits"]["train"]["num_rows"] == 10 and not (tmp_path / "a" / "valid.jsonl").exists()
    first = convert(source, tokenizer, tmp_path / "b", max_rows=7, num_valid=2)
    assert sum(split["num_rows"] for split in first["splits"].values()) == 7
    long = convert(source, tokenizer, tmp_path / "c", max_tokens=61, drop_long_responses=True)
    assert long["left_out"]["prompt and response over 61 tokens"] > 0
    assert all(split["num_over_max_tokens"] == 0 for split in long["splits"].values())
    again = convert(source, tokenizer, tmp_path / "d", drop_duplicates=False)
    assert "prompt seen before" not in again["left_out"]


def test_what_cannot_be_done_is_refused(source, tokenizer, tmp_path):
    convert(source, tokenizer, tmp_path / "out")
    with pytest.raises(DataError, match="already has train.jsonl, valid.jsonl, report.json"):
        convert(source, tokenizer, tmp_path / "out")
    with pytest.raises(DataError, match="41 of 44 rows are left, too few for 41 validation rows"):
        convert(source, tokenizer, tmp_path / "other", num_valid=41)
    assert not (tmp_path / "other").exists()
    with pytest.raises(DataError, match=r"rows\.jsonl:44"):
        convert(source, tokenizer, tmp_path / "other", skip_bad_rows=False)
    with pytest.raises(ConfigError, match="leave no token for a response"):
        convert(source, tokenizer, tmp_path / "other", max_prompt_tokens=9, max_tokens=9)


def test_the_tool_is_the_same_function(source, folder, tokenizer, tmp_path):
    def tool(*arguments):
        command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    limits = ["--template", "plain", "--max-prompt-tokens", 60, "--max-tokens", 160, "--valid", 5, "--skip-bad-rows"]
    done = tool(source, tmp_path / "tool", "--tokenizer", folder, *limits)
    assert done.returncode == 0, done.stderr
    assert "train: 36 rows" in done.stdout
    convert(source, tokenizer, tmp_path / "function")
    for name in ("train.jsonl", "valid.jsonl", "report.json"):
        assert (tmp_path / "tool" / name).read_bytes() == (tmp_path / "function" / name).read_bytes()
    refused = tool(source, tmp_path / "tool2", "--tokenizer", folder)
    assert refused.returncode == 2
    assert [line for line in refused.stderr.splitlines() if line.startswith("megadistill: ")] == [
        refused.stderr.splitlines()[-1]
    ]
    assert "rows.jsonl:44" in refused.stderr and "Traceback" not in refused.stderr


def test_chats_stay_chats(tokenizer, tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]
    rows = [{"messages": [*chat, {"role": "assistant", "content": f"Hello {n}."}], "source": "x"} for n in range(2)]
    rows.append({"messages": [*chat, {"role": "user", "content": "And?"}], "tools": [{"name": "add"}]})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATES["chatml"], encoding="utf-8")
    chosen = ConvertOptions(str(path), prompts=PromptSettings(chat_template=str(template)))
    report = write_converted([convert_share(chosen, tokenizer)], chosen, tmp_path / "out")
    assert report["template"] == "chat" and report["left_out"] == {"prompt seen before": 1}
    assert report["rows"].endswith("3 chats (messages, tools); not used: source")
    first, last = load_examples(tmp_path / "out" / "train.jsonl").examples
    assert [message["content"] for message in first.chat.messages] == ["Be brief.", "Hi."]
    assert first.references == ("Hello 0.",)
    assert last.chat.tools == ({"name": "add"},) and last.chat.reply is None


def test_tables_of_chats(tokenizer, tmp_path):
    """A call of a tool is an answer of some words, and messages may hold dates."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {"a": 1}}], "at": None}
    question = {"role": "user", "content": "1 + 1?", "tool_calls": None, "at": datetime.date(2026, 1, 2)}
    path, template = tmp_path / "rows.parquet", tmp_path / "template.jinja"
    parquet.write_table(pyarrow.table({"messages": [[question, call]]}), path)
    template.write_text(TEMPLATES["thinking"], encoding="utf-8")
    prompts = PromptSettings(chat_template=str(template))
    chosen = ConvertOptions(str(path), prompts=prompts, min_reference_words=1)
    report = write_converted([convert_share(chosen, tokenizer)], chosen, tmp_path / "out")
    assert report["rows"].endswith("1 chats (messages)") and report["splits"]["train"]["num_without_references"] == 0
    (row,) = load_examples(tmp_path / "out" / "train.jsonl").examples
    assert row.chat.messages[0]["at"] == "2026-01-02" and row.chat.reply["tool_calls"] == call["tool_calls"]


def test_answers_that_training_would_cut_are_said(source, folder, tmp_path, capsys):
    arguments = [str(source), str(tmp_path / "out"), "--tokenizer", str(folder), "--template", "plain"]
    limits = ["--max-prompt-tokens", "60", "--max-tokens", "100", "--skip-bad-rows", "--valid", "5"]
    assert main(["prepare", *arguments, *limits]) == 0
    split = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["splits"]["train"]
    assert split["num_over_max_tokens"] > 0
    said = capsys.readouterr().out
    assert (
        f"WARNING: {split['num_over_max_tokens']} of {split['num_rows']} train rows have more than 100 tokens" in said
    )
    assert "--drop-long-responses leaves them out" in said


def test_taken_files_are_refused_before_anything_is_read(source, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.jsonl").touch()
    assert main(["prepare", str(tmp_path / "none.jsonl"), str(tmp_path / "out"), "--tokenizer", "none"]) == 2
    assert "already has train.jsonl; choose another folder, or --overwrite" in capsys.readouterr().err
