"""Rows as people have them: kinds by their columns, compressed and UTF-16 files, columns that are absent or unused."""

import gzip
import json
import math

import pytest

from megadistill.data.columns import FieldNames
from megadistill.data.dataset import load_examples
from megadistill.errors import DataError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello."},
]


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def one(tmp_path, row, **options):
    loaded = load_examples(written(tmp_path / "rows.jsonl", row), **options)
    return loaded.examples[0], loaded.description


KINDS = {
    "alpaca": ({"instruction": "Q", "input": "C", "output": "A"}, ("Q", "C", ("A",))),
    "dolly": ({"instruction": "Q", "context": "C", "response": "A", "category": "qa"}, ("Q", "C", ("A",))),
    "prompt and completion": ({"prompt": "Q", "completion": "A"}, ("Q", "", ("A",))),
    "prompt and response": ({"prompt": "Q", "response": "A"}, ("Q", "", ("A",))),
    "preference": ({"prompt": "Q", "chosen": "A", "rejected": "B"}, ("Q", "", ("A",))),
    "LLaMA-Factory's preference": (
        {"instruction": "Q", "input": "C", "chosen": "A", "rejected": "B"},
        ("Q", "C", ("A",)),
    ),
    "a table with NaN": ({"instruction": "Q", "input": math.nan, "output": "A", "system": math.nan}, ("Q", "", ("A",))),
    "what generate writes": (
        {"id": 7, "instruction": "Q", "input": "", "prompt": "P", "response": "A"},
        ("Q", "", ("A",)),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_instruction_rows(tmp_path, kind):
    row, (instruction, context, references) = KINDS[kind]
    example, _ = one(tmp_path, row)
    assert (example.instruction, example.input, example.references, example.chat) == (
        instruction, context, references, None,
    )  # fmt: skip


CHATS = {
    "messages": {"messages": CHAT},
    "messages beside an instruction": {"messages": CHAT, "instruction": "Other."},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}],
        "system": "Be brief.",
    },
    "lists of messages": {"prompt": CHAT[:2], "completion": CHAT[2:]},
    "a whole chosen chat": {"prompt": "Hi.", "chosen": CHAT, "rejected": CHAT},
    "JSON text": {"messages": json.dumps(CHAT)},
    "a system prompt beside texts": {"prompt": "Hi.", "completion": "Hello.", "system": "Be brief."},
    "a system prompt beside a preference": {"prompt": "Hi.", "chosen": "Hello.", "system": "Be brief."},
    "a message of its own": {"prompt": CHAT[:2], "completion": CHAT[2]},
    "what generate writes": {"id": None, "messages": CHAT[:2], "prompt": "P", "response": "Hello."},
    "a chosen message": {
        "conversations": [{"from": "human", "value": "Hi."}],
        "system": "Be brief.",
        "chosen": {"from": "gpt", "value": "Hello."},
    },
    "a whole chosen chat beside its beginning": {"messages": CHAT[:2], "chosen": CHAT},
    "a chosen answer": {"prompt": CHAT[:2], "chosen": CHAT[2:], "rejected": CHAT[2:]},
    "parts": {"messages": [CHAT[0], {"role": "user", "content": [{"type": "text", "text": "Hi."}]}, CHAT[2]]},
    "llama-factory": {"instruction": "Hi.", "output": "Hello.", "system": "Be brief.", "history": []},
}


@pytest.mark.parametrize("kind", CHATS)
def test_kinds_of_chats(tmp_path, kind):
    example, _ = one(tmp_path, CHATS[kind])
    assert [(m["role"], m["content"]) for m in example.chat.messages] == [("system", "Be brief."), ("user", "Hi.")]
    assert example.chat.reply["content"] == "Hello." and example.references == ("Hello.",)
    assert example.instruction == "Hi."


def test_a_chat_that_waits_for_an_answer_has_no_reference(tmp_path):
    example, description = one(tmp_path, {"messages": CHAT[:2]})
    assert example.references == () and example.chat.reply is None and description.endswith("; no references")


def test_a_blank_answer_is_no_reference(tmp_path):
    blank = {"role": "assistant", "content": " "}
    for row in (
        {"messages": [*CHAT[:2], blank]},
        {"prompt": "Hi.", "chosen": " "},
        {"prompt": "Hi.", "completion": ""},
    ):
        example, description = one(tmp_path, row)
        assert example.references == () and description.endswith("; no references")
        assert example.chat is None or example.chat.reply is None


def test_an_answer_beside_a_chat_that_has_one_is_not_used(tmp_path):
    example, description = one(tmp_path, {"messages": CHAT, "response": "Other."})
    assert example.references == ("Hello.",) and description.endswith("(messages); not used: response")
    path = written(
        tmp_path / "both.jsonl", {"messages": CHAT, "response": "X"}, {"messages": CHAT[:2], "response": "Y"}
    )
    loaded = load_examples(path)
    assert [row.references for row in loaded.examples] == [("Hello.",), ("Y",)]
    assert loaded.description.endswith("(messages, response)")


def test_tools_beside_texts(tmp_path):
    example, _ = one(tmp_path, {"prompt": "Hi.", "completion": "Hello.", "tools": '[{"name": "add"}]'})
    assert example.chat.tools == ({"name": "add"},) and example.chat.reply["content"] == "Hello."


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "[{'role': 'user'}]"}, "field 'messages' is not valid JSON"),
        ({"instruction": "Q", "history": 5}, "field 'history' must be a list, not a number"),
        (
            {"messages": [CHAT[1], {**CHAT[2], "tool_calls": "add"}]},
            r"messages\[1\].tool_calls must be a list, not a str",
        ),
    ],
)
def test_values_of_wrong_types(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        one(tmp_path, row)


def test_rows_that_are_copied_can_be_written(tmp_path):
    """A broken character in a column that is not used stops the run before it works, not after."""
    row = {"instruction": "Q", "tags": ["\ud83d"]}
    assert one(tmp_path, row)[1].endswith("not used: tags; no references")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: field 'tags' has a broken character"):
        one(tmp_path, row, keep_rows=True)
    _, description = one(tmp_path, {"id": 7, "instruction": "Q"}, keep_rows=True, prompts_only=True)
    assert description.endswith("; copied: id")


def test_history_and_tools(tmp_path):
    example, _ = one(tmp_path, {"instruction": "And now?", "output": "Yes.", "history": [["Is it?", "No."]]})
    assert [m["content"] for m in example.chat.messages] == ["Is it?", "No.", "And now?"]
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    written_call = {"function": {"name": "add", "arguments": json.dumps({"a": 1})}}  # OpenAI's way
    turns = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": None, "tool_calls": [written_call]},
        {"role": "tool", "content": "2", "tool_calls": None},
        {"role": "assistant", "content": "2."},
    ]
    example, description = one(tmp_path, {"messages": turns, "tools": json.dumps([{"name": "add"}])})
    assert example.chat.tools == ({"name": "add"},) and "tool_calls" not in example.chat.messages[2]
    assert example.chat.messages[1]["tool_calls"] == [call] and "(messages, tools)" in description


def test_the_description_says_what_is_used_and_what_is_not(tmp_path):
    _, description = one(tmp_path, {"instruction": "Q", "context": "C", "response": "A", "category": "qa"})
    assert description.endswith("1 instruction rows (instruction, context, response); not used: category")
    _, description = one(tmp_path, {"id": 7, "instruction": "Q", "output": "R", "response": "A"})
    assert description.endswith("(instruction, output); not used: id, response")


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"instruction": "Q", "Output": "A"}, "no row has a field 'output' .*did you mean Output"),
        ({"instruction": "Q", " output": "A"}, "did you mean  output"),
        ({"instruction": "Q", "answer": "A"}, "did you mean answer"),
        ({"instruction": "Q", "Input": "C", "output": "A"}, "no row has a field 'input' .*did you mean Input"),
        (
            {"question": "Q", "context": "C", "answer": "A"},
            "'instruction' is missing .*messages; .*did you mean question",
        ),
    ],
)
def test_a_column_with_another_name_is_not_lost(tmp_path, row, hint):
    with pytest.raises(DataError, match=hint) as caught:
        one(tmp_path, row)
    assert "skip_bad_rows" not in str(caught.value.setting)


def test_named_columns(tmp_path):
    fields = FieldNames("question", "context", "answer")
    example, _ = one(tmp_path, {"question": "Q", "context": "C", "answer": 42, "messages": CHAT}, fields=fields)
    assert (example.instruction, example.input, example.references, example.chat) == ("Q", "C", ("42",), None)
    with pytest.raises(DataError, match="no row has a field 'answers'"):
        one(tmp_path, {"question": "Q", "answer": "A"}, fields=FieldNames("question", "input", "answers"))
    # Prompts are wanted only: what the column of the answers is called does not matter.
    one(tmp_path, {"instruction": "Q", "answer": "A"}, prompts_only=True)


def test_numbers_are_text_where_text_is_meant(tmp_path):
    example, _ = one(tmp_path, {"instruction": 3, "input": 1.5, "output": [42, "x"]})
    assert (example.instruction, example.input, example.references) == ("3", "1.5", ("42", "x"))


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "must be a list of messages, not an empty list"),
        ("Hi.", "must be a list of messages, not a string"),
        ([{"content": "Hi."}], r"messages\[0\] has no role \(its keys: content\)"),
        ([{"role": "usr", "content": "Hi."}], r"unknown role 'usr'; did you mean user\?"),
        ([{"role": "function_call", "content": "x"}], r"unknown role 'function_call'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "part of type 'image'; only text can be read"),
        ([{"role": "user", "content": None}], r"messages\[0\]\.content' must be a string, not null"),
        ([CHAT[0], CHAT[2]], "a turn of the system where a turn of the user must come before the answer"),
        ([CHAT[2]], "there is no turn where a turn of the user"),
    ],
)
def test_broken_chats_are_bad_rows(tmp_path, turns, reason):
    path = written(tmp_path / "rows.jsonl", {"messages": CHAT}, {"messages": turns}, {"messages": CHAT})
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*{reason}"):
        load_examples(path)
    assert [row.id for row in load_examples(path, skip_bad_rows=True).examples] == [0, 2]


def test_files_that_people_have(tmp_path):
    row = {"instruction": "Größe?", "input": "", "output": "2"}
    lines = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    table = "instruction, input ,output\r\nGröße?,,2\r\n"
    files = {
        "a.jsonl.gz": gzip.compress(lines),
        "a.json.gz": gzip.compress(b"[" + lines + b"]"),
        "a.csv.gz": gzip.compress(table.encode()),
        "utf16.csv": table.encode("utf-16"),
        "excel.csv": table.replace(",", "\t").encode("utf-16"),
        "bom.csv": table.encode("utf-8-sig"),
        "utf16.jsonl": lines.decode().encode("utf-16"),
        "list.jsonl": json.dumps([row], indent=1).encode(),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        (example,) = load_examples(tmp_path / name).examples
        assert (example.instruction, example.references) == ("Größe?", ("2",)), name
    (tmp_path / "prompts.txt").write_text("Größe?\n\nAnd?\n", encoding="utf-8")
    assert [row.instruction for row in load_examples(tmp_path / "prompts.txt").examples] == ["Größe?", "And?"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl.gz").write_bytes(gzip.compress(lines))
    assert load_examples(tmp_path / "folder").examples[0].instruction == "Größe?"


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.json", b'{\n "version": 1,\n "data": [{}]\n}', "a JSON object; rows must be a JSON list.*'data'"),
        ("a.csv", b"instruction;output\nx;y\n", "separated by semicolons; save it with commas"),
        ("a.csv", b"output,instruction,output\nx,y,z\n", "names the column 'output' more than once"),
        ("a.csv", "instruction,output\nx,y\n".encode("utf-16")[:-1], "invalid UTF-16"),
        ("a.jsonl.gz", b"not compressed", "not a readable gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"instruction": "x"}\n', mtime=0)[:-6], "not a readable gzip file"),
        ("a.jsonl", b'{"instruction": "x', "not valid JSON: Unterminated string starting at column 17"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read_say_why(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=reason) as caught:
        load_examples(tmp_path / name)
    assert str(caught.value).isprintable()


def test_rows_can_be_kept_as_they_were(tmp_path):
    row = {"id": "a7", "instruction": "Q", "category": {"x": 1}}
    example, _ = one(tmp_path, row, keep_rows=True, prompts_only=True)
    assert example.row == row and one(tmp_path, row)[0].row == {}
