"""Prepared rows (``data.cache_dir``) equal the rows that a process tokenizes for itself, for every form of rows."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from megadistill.cli.main import main
from megadistill.config.load import load_config
from megadistill.data import row_sources
from megadistill.data.fingerprint import is_fingerprint_of, rows_fingerprint
from megadistill.data.row_file import ChainedRows, MappedRows
from megadistill.data.row_sources import RECORDS
from megadistill.data.row_store import PreparationStopped
from megadistill.data.tokenize import load_tokenizer
from megadistill.errors import DataError
from megadistill.training.data import TrainingData, load_training_data
from tests.support.chats import chat_tokenizer

ROWS = [{"instruction": f"say {i} ü", "input": "x " * (i % 9), "output": "yes " * (i % 7)} for i in range(40)]
CHATS = [
    {"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": f"b {i}"},
        {"role": "user", "content": "c " * (i + 1)}, {"role": "assistant", "content": "d e"},
    ]}
    for i in range(9)
]  # fmt: skip
LATE_CHAT = [*ROWS[:3], ROWS[3] | {"system": "be brief"}]  # auto is chat because of one row, and not the first
REFERENCES = [{"instruction": "a", "output": ["one", "two"]}, {"instruction": "b", "output": ""}]


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[Any]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


FORMS: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "instructions": ("rows.jsonl", lines(ROWS), ()),
    "several references": ("rows.jsonl", lines(REFERENCES), ()),
    "dropped": ("rows.jsonl", lines(ROWS), ("data.template=plain", "data.max_prompt_tokens=12")),
    "truncated": (
        "rows.jsonl", lines(ROWS),
        ("data.template=plain", "data.max_prompt_tokens=12", "data.max_tokens=16", "data.long_prompt=truncate"),
    ),
    "truncated ends": (
        "rows.jsonl", lines(ROWS),
        ("data.template=plain", "data.max_prompt_tokens=12", "data.long_prompt=truncate_end"),
    ),
    "bad rows": ("rows.jsonl", b"{\n" + lines(ROWS[:3]) + b"\n" + lines(ROWS[3:]), ("data.skip_bad_rows=true",)),
    "chats": ("rows.jsonl", lines(CHATS), ()),
    "all turns": ("rows.jsonl", lines(CHATS), ("data.train_on=all", "loss.dac_kl=0", "loss.span=0")),
    "a late chat": ("rows.jsonl", lines(LATE_CHAT), ()),
    "list": ("rows.json", json.dumps(ROWS).encode(), ()),
    "table": ("rows.csv", b"instruction,output\na,b\n\"c\nd\",e\n", ()),
    "text": ("rows.txt", b"a\n\nb\n", ()),
    "compressed": ("rows.jsonl.gz", gzip.compress(lines(ROWS)), ()),
    "parquet": ("rows.parquet", parquet(ROWS), ()),
    "columns": (
        "rows.jsonl", lines([{"q": "a", "a": "b"}]), ("data.instruction_field=q", "data.output_field=a"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def config_for(path: Path, *overrides: str) -> Any:
    base = Path(__file__).parents[2] / "configs" / "base.yaml"
    fixed = (f"run.dir={path.parent / 'run'}", "model.student.path=x", "model.teacher.path=x", "train.eval_every=0")
    given = f"data.train_path={path}"
    return load_config(base, [*fixed, given, *overrides])


def loaded(tokenizer: Any, path: Path, *overrides: str) -> TrainingData:
    return load_training_data(config_for(path, *overrides), tokenizer, len(tokenizer))


def places(rows: Any) -> list[str]:
    return [row.where for row in rows]


@pytest.mark.parametrize("form", FORMS)
def test_prepared_rows_are_the_rows(tmp_path: Path, tokenizer: Any, form: str) -> None:
    name, content, settings = FORMS[form]
    file = tmp_path / name
    file.write_bytes(content)
    others = (f"data.valid_path={file}", f"data.prompts_path={file}", "data.prompts_ratio=0.5")
    listed = loaded(tokenizer, file, *settings, *others)
    for _ in range(2):  # made, and found again
        mapped = loaded(tokenizer, file, *settings, *others, f"data.cache_dir={tmp_path / 'cache'}")
        for part in ("train", "prompts", "valid"):
            before, now = getattr(listed, part), getattr(mapped, part)
            assert isinstance(now, MappedRows)
            assert list(now) == before
            assert places(now) == places(before)
            assert list(now[1:7:2]) == before[1:7:2]
            assert rows_fingerprint(now) == rows_fingerprint(before)
            assert rows_fingerprint(now[1:7:2]) == rows_fingerprint(before[1:7:2])
        assert mapped.report == listed.report
        assert (mapped.template, mapped.end_id, mapped.sources) == (listed.template, listed.end_id, listed.sources)
    together = ChainedRows([mapped.train, mapped.prompts])
    assert list(together) == [*listed.train, *listed.prompts]
    assert rows_fingerprint(together) == rows_fingerprint([*listed.train, *listed.prompts])


def sets(cache: Path) -> list[Path]:
    return sorted(folder for folder in cache.iterdir() if folder.is_dir() and folder.name != RECORDS)


def test_the_key_is_what_the_rows_depend_on(tmp_path: Path, tokenizer: Any) -> None:
    cache, file, moved = tmp_path / "cache", tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    file.write_bytes(lines(ROWS))
    moved.write_bytes(lines(ROWS))
    use = f"data.cache_dir={cache}"
    loaded(tokenizer, file, use)
    assert places(loaded(tokenizer, moved, use).train)[0] == f"{moved}:1"
    assert len(sets(cache)) == 1  # the same content under another name
    loaded(tokenizer, file, use, "data.max_tokens=300")
    loaded(tokenizer, file, use, "data.template=plain")
    file.write_bytes(lines(ROWS[1:]))
    assert len(loaded(tokenizer, file, use).train) == len(ROWS) - 1
    assert len(sets(cache)) == 4


def test_rows_of_an_earlier_release_are_recognized(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(ROWS[:2]))
    rows = loaded(tokenizer, file, f"data.cache_dir={tmp_path / 'cache'}", "data.template=plain").train
    from array import array
    from hashlib import blake2b

    numbers = [n for r in rows for n in (len(r.prompt_ids), len(r.response_ids or ()), 0, *r.prompt_ids,
                                         *(r.response_ids or ()))]  # fmt: skip
    if rows[0].response_ids is None:
        numbers[1] = -1
    before = f"2 rows, checksum {blake2b(array('q', numbers).tobytes(), digest_size=8).hexdigest()}"
    assert is_fingerprint_of(before, rows)
    assert not is_fingerprint_of(before, rows[:1])


def test_what_cannot_be_prepared_says_so_and_leaves_nothing(tmp_path: Path, tokenizer: Any) -> None:
    cache, file = tmp_path / "cache", tmp_path / "rows.jsonl"
    file.write_bytes(lines(ROWS) + b"{\n")
    for _ in range(2):
        with pytest.raises(DataError, match=r"rows.jsonl:41: not valid JSON"):
            loaded(tokenizer, file, f"data.cache_dir={cache}")
    assert not sets(cache)
    file.write_bytes(lines(ROWS))
    loaded(tokenizer, tmp_path / "rows.jsonl", f"data.cache_dir={cache}")
    (records,) = cache.glob("*/part_*.bin")
    content = bytearray(records.read_bytes())
    content[0] ^= 1
    records.write_bytes(content)
    with pytest.raises(DataError, match="damaged; remove the folder"):
        list(loaded(tokenizer, file, f"data.cache_dir={cache}").train)
    records.write_bytes(content[:-1])
    with pytest.raises(DataError, match="incomplete"):
        loaded(tokenizer, file, f"data.cache_dir={cache}")


def by_dataset(folder: Path) -> Path:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder / "saved"))
    return folder / "saved"


@pytest.mark.parametrize("form", ["bad rows", "a late chat", "list", "table", "parquet", "all turns", "datasets"])
def test_parts_make_the_same_rows(tmp_path: Path, tokenizer: Any, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_sources, "PART_ROWS", 3)
    monkeypatch.setattr(row_sources, "_PARTS_OF_A_SIZE", 2)
    name, content, settings = FORMS.get(form, ("", b"", ()))
    file = tmp_path / name if name else by_dataset(tmp_path)
    if name:
        file.write_bytes(content)
    listed = loaded(tokenizer, file, *settings)
    mapped = loaded(tokenizer, file, *settings, f"data.cache_dir={tmp_path / 'cache'}")
    assert (list(mapped.train), places(mapped.train)) == (listed.train, places(listed.train))
    assert (mapped.report, mapped.template, mapped.sources) == (listed.report, listed.template, listed.sources)


def test_a_stopped_preparation_keeps_its_parts(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_sources, "PART_ROWS", 5)
    cache, file, asked = tmp_path / "cache", tmp_path / "rows.jsonl", 0
    file.write_bytes(lines(ROWS))
    config = config_for(file, f"data.cache_dir={cache}")

    def is_stopping() -> bool:
        nonlocal asked
        asked += 1
        return asked > 3

    with pytest.raises(PreparationStopped):
        load_training_data(config, tokenizer, len(tokenizer), is_stopping)
    kept = {part: part.stat().st_mtime_ns for part in cache.glob("*.partial/part_*.bin")}
    assert 0 < len(kept) < 8
    assert list(loaded(tokenizer, file, f"data.cache_dir={cache}").train) == loaded(tokenizer, file).train
    made = {part.name: part.stat().st_mtime_ns for part in cache.glob("*/part_*.bin")}
    assert len(made) == 8 and all(made[part.name] == when for part, when in kept.items())


def test_a_file_is_read_again_when_it_changed(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_sources, "_SETTLED_S", -1.0)  # as if the file were older
    file, use = tmp_path / "rows.jsonl", f"data.cache_dir={tmp_path / 'cache'}"
    file.write_bytes(lines(ROWS))
    before = file.stat()
    loaded(tokenizer, file, use)
    with monkeypatch.context() as unread:
        unread.setattr(row_sources, "_read_lines", None)  # nothing reads the file for its checksum
        assert len(loaded(tokenizer, file, use).train) == len(ROWS)
    time.sleep(0.05)
    file.write_bytes(lines(ROWS).replace(b"say 1 ", b"say 2 "))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time
    assert list(loaded(tokenizer, file, use).train) == loaded(tokenizer, file).train


def test_the_verb_prepares_what_a_run_finds(tmp_path: Path, tokenizer: Any) -> None:
    cache, file = tmp_path / "cache", tmp_path / "rows.jsonl"
    file.write_bytes(lines(ROWS))
    words = ["prepare", "--rows", str(file), "--tokenizer", tokenizer.name_or_path, "--cache-dir", str(cache)]
    command = [sys.executable, "-m", "megadistill", *words, "--workers", "2"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "40 rows prepared" in done.stdout
    made = sets(cache)
    assert list(loaded(load_tokenizer(tokenizer.name_or_path), file, f"data.cache_dir={cache}").train)
    assert sets(cache) == made  # the run makes no other
    for wrong in (words[:3], [*words, "train.max_steps=1"], [*words, "--config", "x.yaml"]):
        assert main(wrong) == 2


def _load(tokenizer: Any, file: Path, answers: Any) -> None:
    answers.put(rows_fingerprint(loaded(tokenizer, file, f"data.cache_dir={file.parent / 'cache'}").train))


def test_processes_that_start_together_make_one_set(tmp_path: Path, tokenizer: Any) -> None:
    file, fork = tmp_path / "rows.jsonl", get_context("fork")
    file.write_bytes(lines(ROWS * 50))
    answers = fork.Queue()
    processes = [fork.Process(target=_load, args=(tokenizer, file, answers)) for _ in range(3)]
    for process in processes:
        process.start()
    found = {answers.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert found == {rows_fingerprint(loaded(tokenizer, file).train)}
    assert len(sets(tmp_path / "cache")) == 1
