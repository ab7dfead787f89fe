"""What generate reads and writes: columns, prompts, formats, templates, and what it says about them."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import transformers

from megadistill.cli.main import main

ROOT = Path(__file__).parents[2]


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megadistill: ")]
    assert len(lines) == 1
    return lines[0]


def _generate(assets: Path, *more: str) -> int:
    """A few tokens for a few prompts."""
    model = ["--model", str(assets / "llama" / "student" / "config.json"), "--tokenizer", str(assets / "tokenizer")]
    return main(
        ["generate", *model, "--max-prompt-tokens", "100", "--max-new-tokens", "4", "--temperature", "0", *more]
    )


def test_columns_of_the_user_stay_and_name_the_answer_apart(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "dolly.jsonl"
    given = {"id": "q-7", "question": "What is it?", "context": "A river.", "response": "Blue.", "tags": ["x"]}
    rows.write_text(json.dumps(given) + "\n", encoding="utf-8")
    fields = ["--instruction-field", "question", "--input-field", "context", "--template", "plain"]
    assert _generate(assets, "--input", str(rows), *fields) == 0
    printed = capsys.readouterr()
    (row,) = map(json.loads, printed.out.splitlines())
    assert {name: row[name] for name in given} == given
    assert list(row)[-2:] == ["prompt", "model_response"] and row["prompt"] == "What is it?\nA river.\n"
    assert "copied: id, response, tags" in printed.err and "the answer to 'model_response'" in printed.err
    assert _generate(assets, "--input", str(rows)) == 2
    assert "did you mean question? (see --instruction-field)" in _error(capsys)


def test_no_column_is_replaced(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not even of rows that generate wrote before; a null or NaN is no id, and ids may repeat."""
    rows = tmp_path / "rows.jsonl"
    given = {"instruction": "Why?", "id": None, "prompt": "p", "response": "r", "model_response": "m"}
    rows.write_text(
        "".join(json.dumps({**given, "id": id_}) + "\n" for id_ in (None, math.nan, 5, 5)), encoding="utf-8"
    )
    output = tmp_path / "out.jsonl"
    assert _generate(assets, "--input", str(rows), "--template", "plain", "--output", str(output)) == 0
    written = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row.pop("id") for row in written] == [0, 1, 5, 5]
    given.pop("id")
    assert all(row.items() >= given.items() for row in written)
    assert all(list(row)[-2:] == ["model_prompt", "model_model_response"] for row in written)
    assert "the answer to 'model_model_response'" in capsys.readouterr().err


def test_chats_go_round(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What generate writes to chats is read as their answers, in every format; what is left out is said."""
    from megadistill.data.dataset import load_examples

    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        encoding="utf-8",
    )
    system, user = {"role": "system", "content": "Be\rbrief."}, {"role": "user", "content": "Hi."}
    long = {"role": "user", "content": "No. " * 100}
    chats = [[system, user], [user], [system], [long]]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    more = ["--chat-template", str(template), "--skip-bad-rows", "--long-prompt", "truncate", "--input", str(rows)]
    for name in ("a.jsonl", "a.csv", "a.tsv", "a.parquet"):
        output = tmp_path / name
        assert _generate(assets, *more, "--output", str(output)) == 0
        loaded = load_examples(output, keep_rows=True)
        assert [list(row.chat.messages) for row in loaded.examples if row.chat is not None] == chats[:2], name
        answers = [str(row.row["response"]) for row in loaded.examples]
        assert [row.references for row in loaded.examples] == [
            (answer,) if answer.strip() else () for answer in answers
        ]
        printed = capsys.readouterr().err
        assert "1 bad rows are left out, the first: " in printed and "rows.jsonl:3: " in printed
        assert "1 chats are left out: even without their earlier turns they are over 100 tokens" in printed


def test_rows_that_do_not_fit_a_table_are_not_lost(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, ids in enumerate(((1, "b"), (10**30, 2))):
        rows, output = tmp_path / "rows.jsonl", tmp_path / f"out{number}.parquet"
        rows.write_text("".join(json.dumps({"id": i, "instruction": "Hi."}) + "\n" for i in ids), encoding="utf-8")
        assert _generate(assets, "--input", str(rows), "--template", "plain", "--output", str(output)) == 2
        assert f"the rows are in {output}.partial, as JSON lines" in _error(capsys)
        assert len(Path(f"{output}.partial").read_text(encoding="utf-8").splitlines()) == 2


def test_prompts_of_the_command_line_and_of_standard_input(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _generate(assets, "--prompt", "What is it?", "--prompt", "Yes.", "--template", "plain") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["id"], row["prompt"]) for row in rows] == [(0, "What is it?\n"), (1, "Yes.\n")]
    data = "".join(json.dumps({"instruction": text}) + "\n" for text in ("What is it?", "Yes."))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data.encode()), encoding="utf-8"))
    assert _generate(assets, "--input", "-", "--template", "plain") == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    for bad, message in (
        (b"instruction\nHi\n", "standard input:1: not valid JSON"),
        (b"", "standard input: the file is"),
    ):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(bad), encoding="utf-8"))
        assert _generate(assets, "--input", "-") == 2
        assert message in _error(capsys)
    for text, message in ((" ", "--prompt: the text is empty"), ("a\udcff", "'--prompt' has a broken character")):
        assert _generate(assets, "--prompt", text) == 2
        assert message in _error(capsys)
    assert _generate(assets, "--template", "plain") == 2
    assert "one of the arguments --input --prompt --messages is required" in _error(capsys)


def test_the_name_of_the_file_is_its_format(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megadistill.data.dataset import load_examples

    prompts = ["--prompt", "What, is\nit?", "--prompt", "Größe?", "--template", "plain"]
    for name in ("a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.csv.gz", "no_suffix"):
        output = tmp_path / name
        assert _generate(assets, *prompts, "--output", str(output)) == 0
        source = output if output.suffix else output.rename(tmp_path / "renamed.jsonl")
        found = load_examples(source, keep_rows=True).examples
        assert [row.instruction for row in found] == ["What, is\nit?", "Größe?"], name
        assert [str(row.row["id"]) for row in found] == ["0", "1"]
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name or "progress" in path.name]
    capsys.readouterr()
    assert _generate(assets, *prompts, "--output", str(tmp_path / "a.xlsx")) == 2
    assert "a.xlsx: cannot write .xlsx; allowed: .jsonl, .json, .csv" in _error(capsys)


def test_truncated_prompts_are_counted_and_shown_as_they_were_read(
    assets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompt", "No. " * 200 + "Why?", "--prompt", "Yes.", "--template", "plain", "--long-prompt", "truncate"]
    assert _generate(assets, *words) == 0
    printed = capsys.readouterr()
    long, short = (json.loads(line)["prompt"] for line in printed.out.splitlines())
    assert long.endswith("Why?\n") and len(long) < 500 and short == "Yes.\n"
    assert "1 of 2 prompts were over 100 tokens and were truncated" in printed.err


def test_a_model_of_a_run_is_prompted_as_it_was_trained(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Template and limits are those of resolved.yaml, above the checkpoint."""
    from megadistill.config.load import dump_resolved, load_config

    run = tmp_path / "run"
    hf = run / "checkpoints" / "step_1" / "hf"
    random = transformers.AutoConfig.from_pretrained(assets / "llama" / "student")
    transformers.AutoModelForCausalLM.from_config(random).save_pretrained(hf)
    settings = ["data.template=plain", "data.max_prompt_tokens=50", "data.max_tokens=53", "generation.max_new_tokens=9"]
    config = load_config(ROOT / "configs" / "smoke.yaml", [f"run.dir={run}", *settings])
    dump_resolved(config, run / "resolved.yaml")
    model = ["--model", str(hf), "--tokenizer", str(assets / "tokenizer"), "--temperature", "0"]
    assert main(["generate", *model, "--prompt", "x " * 20]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["prompt"] == "x " * 20 + "\n"
    assert f"from {run / 'resolved.yaml'}: --template plain, --max-prompt-tokens 50, --max-new-tokens 9" in printed.err
    (run / "checkpoints" / "best").write_text("step_1\n", encoding="utf-8")
    best = ["--model", str(run / "checkpoints" / "best"), *model[2:]]
    assert main(["generate", *best, "--prompt", "x " * 20]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "x " * 20 + "\n"
    given = ["--template", "alpaca", "--max-prompt-tokens", "126", "--max-new-tokens", "2"]
    assert main(["generate", *model, "--prompt", "x", *given]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["prompt"].startswith("Below is an instruction") and "from " not in printed.err


def test_the_template_of_the_run_keeps_its_variables(tmp_path: Path) -> None:
    """Also where the user names it; another one does not get them."""
    from megadistill.cli.generate_options import fill_in, generate_parser
    from megadistill.config.load import dump_resolved, load_config

    settings = ["data.template=chat", "data.chat_template_kwargs.enable_thinking=false"]
    config = load_config(ROOT / "configs" / "smoke.yaml", [f"run.dir={tmp_path}", *settings])
    dump_resolved(config, tmp_path / "resolved.yaml")
    for more, variables in ([], False), (["--template", "chat"], False), (["--template", "plain"], None):
        parsed = generate_parser().parse(["--model", str(tmp_path), "--prompt", "x", *more])
        fill_in(parsed)
        assert parsed.chat_template_kwargs.get("enable_thinking") is variables


def test_chats_of_the_command_line_with_a_runs_template_and_limits(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--messages: JSON, a file, standard input; --run: the settings of a run that the model does not belong to."""
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        encoding="utf-8",
    )
    run = tmp_path / "run"
    run.mkdir()
    sections = {
        "run": {"dir": str(run)},
        "model": {"teacher": {"path": "t"}, "student": {"path": "s"}},
        "data": {"template": "chat", "chat_template": str(template), "max_prompt_tokens": 90, "max_tokens": 97},
        "generation": {"max_new_tokens": 5},
    }
    (run / "resolved.yaml").write_text(json.dumps(sections), encoding="utf-8")
    model = ["--model", str(assets / "llama" / "student" / "config.json"), "--tokenizer", str(assets / "tokenizer")]
    user, system = {"role": "user", "content": "Hi."}, {"role": "system", "content": "Be brief."}
    file = tmp_path / "chats.json"
    file.write_text(json.dumps([[system, user]]), encoding="utf-8")
    given = {
        json.dumps([user]): ["user: Hi.\nassistant: "],
        json.dumps([[user], [system, user]]): ["user: Hi.\nassistant: ", "system: Be brief.\nuser: Hi.\nassistant: "],
        json.dumps({"messages": [user], "id": "a"}): ["user: Hi.\nassistant: "],
        str(file): ["system: Be brief.\nuser: Hi.\nassistant: "],
        "-": ["user: Hi.\nassistant: "],
    }
    for value, prompts in given.items():
        content = io.BytesIO(json.dumps({"messages": [user]}).encode())
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(content, encoding="utf-8"))
        assert main(["generate", *model, "--messages", value, "--run", str(run), "--temperature", "0"]) == 0
        printed = capsys.readouterr()
        assert [json.loads(line)["prompt"] for line in printed.out.splitlines()] == prompts
        assert f"from {run / 'resolved.yaml'}: --template chat" in printed.err and "--max-new-tokens 5" in printed.err
    for value, words in (
        ("[3]", "--messages:1: field 'messages' must be a list of messages, not a number"),
        ("[{", "--messages is not valid JSON"),
        (str(assets / "data" / "prompts.jsonl"), ":1 is no chat; --input takes rows of every kind"),
    ):
        assert main(["generate", *model, "--messages", value, "--run", str(run)]) == 2
        assert words in _error(capsys)
    assert main(["generate", *model, "--messages", "[]", "--run", str(assets)]) == 2
    assert _error(capsys).endswith("is no run directory: it has no resolved.yaml")
