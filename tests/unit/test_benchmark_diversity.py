"""`tools/benchmark.py diversity`: its numbers by hand, and its errors for files that it cannot read."""

import json
from pathlib import Path

import pytest

from tools.benchmarks.diversity import Sample, distinct, main, relative_position, row_of, rows_of

SAMPLES = [
    Sample(1, "a b a b", "a b c b", 2),
    Sample(2, "a b", "a b d", 2),
    Sample(3, "d", "d", -1),
]


def write(run: Path, samples: list[Sample]) -> Path:
    run.mkdir(parents=True)
    (run / "samples.jsonl").write_text(
        "".join(json.dumps({**vars(sample), "prompt": "p"}) + "\n" for sample in samples), encoding="utf-8"
    )
    return run


def test_distinct_counts_over_all_texts():
    # Words a b a b, b c: three of six. Pairs ab ba ab, bc: three of four. Triples aba bab: both.
    assert distinct(["a b a b", "b  c"]) == [pytest.approx(3 / 6), pytest.approx(3 / 4), 1.0]
    assert distinct(["a b", ""]) == [1.0, 1.0, None]


def test_relative_position_is_where_the_texts_part():
    assert relative_position("abcd", "abxd") == 0.5
    assert relative_position("abcd", "abcd and more") == 1.0
    assert relative_position("abcd", "") == 0.0


def test_a_row_by_hand():
    row = row_of("run", "all", SAMPLES)
    assert (row.first_step, row.last_step, row.rows) == (1, 3, 3)
    assert row.corrected_share == row.changed_share == pytest.approx(2 / 3)
    assert row.error_position == 2
    assert row.relative_position == pytest.approx((4 / 7 + 1) / 2)
    assert (row.student_words, row.corrected_words) == (pytest.approx(7 / 3), pytest.approx(8 / 3))
    assert row.student_distinct == [pytest.approx(3 / 7), pytest.approx(2 / 4), 1.0]
    assert row.corrected_distinct == [pytest.approx(4 / 8), pytest.approx(4 / 5), 1.0]


def test_a_run_without_scrg_has_no_position():
    row = row_of("run", "all", [Sample(1, "a b", "a b", -1)])
    assert (row.corrected_share, row.changed_share, row.error_position, row.relative_position) == (0, 0, None, None)


def test_parts_divide_the_steps():
    samples = [Sample(step, "a", "a", -1) for step in range(10, 110, 10) for _ in range(3)]
    found = [(row.part, row.first_step, row.last_step, row.rows) for row in rows_of("run", samples, 4)]
    assert found == [
        ("1/4", 10, 20, 6), ("2/4", 30, 50, 9), ("3/4", 60, 70, 6), ("4/4", 80, 100, 9), ("all", 10, 100, 30),
    ]  # fmt: skip
    assert [row.part for row in rows_of("run", samples[:3], 4)] == ["1/1"]


def test_table_and_files(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("with"), SAMPLES)
    write(Path("without"), [Sample(1, "a\u2028b", "a\u2028b", -1)])
    assert main(["with", "without", "--parts", "3", "--output", "out/found.json"]) == 0
    printed = capsys.readouterr().out
    assert Path("out/found.md").read_text(encoding="utf-8") == printed
    assert "| 1/3 | 1-1 | 1 | 1.00 | 1.00 | 2.0 | 0.57 | 4.0 | 4.0 | 0.500, 0.667, 1.000 |" in printed
    record = json.loads(Path("out/found.json").read_text(encoding="utf-8"))
    assert record["command"] == ("python tools/benchmark.py diversity with without --parts 3 --output out/found.json")
    assert [(row["run"], row["part"]) for row in record["rows"]] == [
        ("with", "1/3"), ("with", "2/3"), ("with", "3/3"), ("with", "all"), ("without", "1/1"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        (b"", "is empty"),
        (b'{"step": 1, "stud', "line 1 is damaged"),
        (b'{"step": 1, "student": "a", "corrected": "a", "error_position": -1}\n7\n', "line 2 is damaged: 'step'"),
        (b'{"step": 1, "student": "a", "corrected": null, "error_position": -1}\n', "'corrected' is not there"),
        (b"\xff\n", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read(content, reason, tmp_path, capsys):
    if content is not None:
        (tmp_path / "samples.jsonl").write_bytes(content)
    assert main([str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and reason in printed.err and printed.err.count("\n") == 1


def test_no_such_run(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 2
    assert "no such run directory" in capsys.readouterr().err
