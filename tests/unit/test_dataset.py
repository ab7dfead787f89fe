"""Instruction rows: formats, field rules, and one clear line for every kind of bad input."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megadistill.data.columns import FieldNames
from megadistill.data.dataset import Example, load_examples
from megadistill.errors import DataError

GOOD = {"instruction": "Add.", "input": "1 2", "output": "3"}
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def write_lines(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_every_format_gives_the_same_examples(tmp_path):
    rows = [GOOD, {"instruction": 'Say "hi",\nplease — é', "input": "", "output": "hi\nthere"}]
    write_lines(tmp_path / "a.jsonl", *rows)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    write_lines(tmp_path / "lines.json", *rows)
    quoted = ["instruction,input,output"] + [
        ",".join('"' + row[key].replace('"', '""') + '"' for key in ("instruction", "input", "output")) for row in rows
    ]
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(quoted).encode("utf-8"))
    (tmp_path / "a.tsv").write_text(
        "\n".join(quoted).replace('","', '"\t"').replace("n,i", "n\ti").replace("t,o", "t\to"), encoding="utf-8"
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    expected = [
        Example(0, "Add.", "1 2", ("3",)),
        Example(1, 'Say "hi",\nplease — é', "", ("hi\nthere",)),
    ]
    for name in ("a.jsonl", "a.json", "lines.json", "a.csv", "a.tsv", "a.parquet"):
        loaded = load_examples(tmp_path / name)
        assert loaded.examples == expected, name
        assert loaded.skipped == [], name
    assert load_examples(tmp_path / "a.csv").examples[1].where.endswith("a.csv:3")
    assert load_examples(tmp_path / "a.parquet").examples[1].where.endswith("a.parquet:row 2")


@pytest.mark.parametrize(
    ("output", "references"),
    [
        ("one", ("one",)),
        (["one", "two"], ("one", "two")),
        (["one", " "], ("one",)),
        ("", ()),
        ("  \n", ()),
        ([], ()),
        (None, ()),
    ],
)
def test_outputs_become_references(tmp_path, output, references):
    path = write_lines(tmp_path / "a.jsonl", {"instruction": "x", "output": output})
    assert load_examples(path).examples[0].references == references


def test_missing_output_and_input_are_no_error(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"instruction": "x"}, {"instruction": "y", "input": None, "other": 3})
    assert [(row.input, row.references) for row in load_examples(path).examples] == [("", ()), ("", ())]


def test_field_names_can_be_chosen(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"question": "q", "context": "c", "answers": ["a"]})
    row = load_examples(path, fields=FieldNames("question", "context", "answers")).examples[0]
    assert (row.instruction, row.input, row.references) == ("q", "c", ("a",))


BAD_ROWS = {
    "not JSON": (b'{"instruction": "x", ', "not valid JSON"),
    "an empty line": (b"", "the line is empty"),
    "a blank line": (b"   ", "the line is empty"),
    "an empty object": ({}, "'instruction' is missing"),
    "a list": ([1], "must be an object"),
    "null": (None, "not null"),
    "a typo": ({"instructoin": "x"}, "did you mean instructoin?"),
    "an empty instruction": ({"instruction": " "}, "'instruction' is empty"),
    "a boolean": ({"instruction": True}, "'instruction' must be a string, not a boolean"),
    "an object as input": ({"instruction": "x", "input": {}}, "'input' must be a string, not an object"),
    "an object as output": ({"instruction": "x", "output": {}}, "'output' must be a string or a list of strings"),
    "a list among outputs": ({"instruction": "x", "output": ["a", []]}, "'output' must be a string or a list"),
    "invalid UTF-8": (b'{"instruction": "\xff"}', "invalid UTF-8"),
    "half a surrogate": (b'{"instruction": "\\ud800"}', "invalid UTF-8"),
    "endless nesting": (b"[" * 100_000, "not valid JSON"),
    "a huge number": (b'{"instruction": ' + b"9" * 5000 + b"}", "not valid JSON"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows_are_named_by_line_or_skipped(tmp_path, kind):
    row, reason = BAD_ROWS[kind]
    path = write_lines(tmp_path / "a.jsonl", GOOD, row, GOOD)
    with pytest.raises(DataError) as caught:
        load_examples(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ") and reason in message and "\n" not in message
    assert "data.skip_bad_rows" in (caught.value.setting or "") and "data." not in message
    loaded = load_examples(path, skip_bad_rows=True)
    assert [row.id for row in loaded.examples] == [0, 2]
    assert len(loaded.skipped) == 1 and loaded.skipped[0].startswith(f"{path}:2: ")


def test_a_bad_row_of_a_json_list_is_named_by_its_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n {"instruction": "x"},\n\n {"instruction": [3]},\n {"instruction": "y"}\n]\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.json:4: field 'instruction' must be a string"):
        load_examples(path)
    assert [row.instruction for row in load_examples(path, skip_bad_rows=True).examples] == ["x", "y"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[\n {"instruction": "x"},\n {"instruction" "y"}]', "a.json:3: not valid JSON"),
        ('[\n {"instruction": "x"}\n {"instruction": "y"}]', "a.json:3: .*a comma or a closing bracket is missing"),
        ('[{"instruction": "x"}', "a.json:1: .*a comma or a closing bracket is missing"),
        ("[]", "it has no rows"),
        ('[{"instruction": "x"}] more', "text after the closing bracket"),
    ],
)
def test_a_broken_json_list_is_an_error_even_when_rows_may_be_skipped(tmp_path, text, reason):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=reason):
        load_examples(path, skip_bad_rows=True)


def test_csv_errors_name_the_line_where_the_record_starts(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'instruction,output\n"two\nlines",x\nonly\n,empty\n\nbroken \xff,x\nlast,y\n')
    with pytest.raises(DataError, match=r"a\.csv:4: 1 fields where the header has 2"):
        load_examples(path)
    loaded = load_examples(path, skip_bad_rows=True)
    assert [row.instruction for row in loaded.examples] == ["two\nlines", "last"]
    assert [message.split(": ")[0].rsplit(":", 1)[1] for message in loaded.skipped] == ["4", "5", "6", "7"]
    path.write_text("instructions,output\nx,y\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.csv:2: field 'instruction' is missing.*did you mean instructions\?"):
        load_examples(path, skip_bad_rows=True)
    path.write_text('instruction\n"never closed\n', encoding="utf-8")
    with pytest.raises(DataError, match="not valid CSV"):
        load_examples(path, skip_bad_rows=True)


def test_a_csv_field_longer_than_the_modules_default_limit_is_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("instruction\n" + "x" * 200_000 + "\n", encoding="utf-8")
    assert len(load_examples(path).examples[0].instruction) == 200_000


def test_parquet_errors(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        load_examples(path)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"instruction": "x"}, {"instruction": None}]), path)
    with pytest.raises(DataError, match=r"a\.parquet:row 2: .*not null"):
        load_examples(path)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "x"}]), path)
    with pytest.raises(DataError, match="field 'instruction' is missing .*did you mean text"):
        load_examples(path)


def test_missing_and_empty_files(tmp_path):
    write_lines(tmp_path / "dolly_train.jsonl", GOOD)
    with pytest.raises(DataError, match=r"no such file or folder: .*did you mean .*dolly_train\.jsonl\?"):
        load_examples(tmp_path / "dolly_trian.jsonl")
    with pytest.raises(DataError, match="no such file"):
        load_examples(tmp_path / "nowhere" / "a.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"empty\.jsonl: the file is empty"):
        load_examples(tmp_path / "empty.jsonl", skip_bad_rows=True)
    write_lines(tmp_path / "blank.jsonl", b"")
    with pytest.raises(DataError, match="all 1 rows are bad"):
        load_examples(tmp_path / "blank.jsonl", skip_bad_rows=True)
    (tmp_path / "a.xlsx").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match="unknown file type '.xlsx'; allowed: .jsonl"):
        load_examples(tmp_path / "a.xlsx")


def test_folders(tmp_path):
    import datasets

    (tmp_path / "plain").mkdir()
    write_lines(tmp_path / "plain" / "valid.jsonl", GOOD)
    loaded = load_examples(tmp_path / "plain", split="valid")
    assert loaded.examples[0].instruction == "Add." and loaded.examples[0].where.endswith("valid.jsonl:1")
    datasets.DatasetDict({"train": datasets.Dataset.from_list([GOOD])}).save_to_disk(str(tmp_path / "saved"))
    assert load_examples(tmp_path / "saved").examples[0].references == ("3",)
    with pytest.raises(DataError, match="the folder cannot be read: .*it has the splits train"):
        load_examples(tmp_path / "saved", split="test")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="the folder cannot be read"):
        load_examples(tmp_path / "nothing")


def test_a_hub_name_that_cannot_be_had_is_one_line(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        load_examples("no-such-owner/no-such-data")
    assert "no such file or folder, and the hub cannot be reached" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the project's shared data files are not here")
def test_shared_files():
    counts = {"dolly_train": (4312, 4312), "self_inst": (242, 242), "sni_11plus": (847, 847), "vicuna": (80, 10)}
    for name, (num_rows, num_with_reference) in counts.items():
        examples = load_examples(SHARED / f"{name}.jsonl").examples
        assert (len(examples), sum(bool(row.references) for row in examples)) == (num_rows, num_with_reference)
