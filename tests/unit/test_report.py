"""Means over seeds, and tables."""

import math
from dataclasses import replace

import pytest

from megadistill.errors import DataError
from megadistill.evaluation.report import mean_std, results_table, summarize, text_table
from megadistill.evaluation.rouge import RougeScores
from megadistill.evaluation.suites import SuiteResult
from megadistill.files import to_jsonable

ONE = RougeScores(10.0, 0.0, 50.0, 60.0, num_scored=3, num_without_references=1)


def test_mean_and_sample_deviation():
    result = mean_std([1.0, 2.0, 3.0, 4.0])
    assert (result.mean, result.num_values) == (2.5, 4)
    assert result.std == pytest.approx(math.sqrt(5 / 3))
    assert mean_std([7.0]).std is None
    assert str(mean_std([7.0])) == "7.00" and str(mean_std([1.0, 3.0])) == "2.00 ± 1.41"
    with pytest.raises(DataError):
        mean_std([])


def test_summary_over_seeds():
    summary = summarize([ONE, replace(ONE, rouge_l=20.0), replace(ONE, rouge_l=30.0)])
    assert (summary.rouge_l.mean, summary.rouge_l.std) == (20.0, 10.0)
    assert summary.exact_match.std == 0.0
    assert (summary.num_scored, summary.num_without_references) == (3, 1)
    assert summarize([replace(ONE, rouge_l=None)]).rouge_l is None


def test_scores_of_different_sets_are_not_averaged():
    with pytest.raises(DataError, match="different sets"):
        summarize([ONE, replace(ONE, num_scored=4)])
    with pytest.raises(DataError, match="no scores"):
        summarize([])


def test_table_columns_line_up():
    table = text_table(["model", "score"], [["teacher", 12.345], ["s", None], ["t", mean_std([1.0, 3.0])]])
    lines = table.split("\n")
    assert lines[0] == "model          score"
    assert lines[2] == "teacher        12.35"
    assert lines[3] == "s                  -"
    assert lines[4] == "t        2.00 ± 1.41"
    assert len({len(line) for line in lines}) == 1
    with pytest.raises(AssertionError):
        text_table(["a"], [["b", "c"]])


def test_results_table_shows_counts_and_gaps():
    sampled = SuiteResult("test", summarize([ONE, ONE]), replace(ONE, rouge_l=77.0), (1, 2), 0, 0, [])
    greedy_only = SuiteResult("vicuna", None, replace(ONE, rouge_l=None, exact_match=None, num_scored=0), (), 0, 0, [])
    table = results_table({"student": {"test": sampled, "vicuna": greedy_only}}, {"student": {"test": 1.25}})
    titles = ["distinct-1", "distinct-2", "scored", "no", "reference", "dropped"]
    assert table.split("\n")[0].split()[-6:] == titles
    first, second = table.split("\n")[2:]
    assert first.split()[:2] == ["student", "test"] and "10.00 ± 0.00" in first and "77.00" in first and "1.25" in first
    assert second.split() == ["student", "vicuna", *"-----", "50.00", "60.00", "0", "1", "0"]


def test_results_table_shows_what_was_left_out():
    """Dropped rows always; truncated prompts and bad rows where a set has any."""
    result = SuiteResult("test", None, ONE, (), num_skipped=0, num_dropped=158, predictions=[])
    cut = replace(result, num_truncated=7)
    header, _, first, second = results_table({"a": {"test": result}, "b": {"test": cut}}).split("\n")
    assert header.endswith("no reference  dropped  truncated") and "bad rows" not in header
    assert first.split()[-2:] == ["158", "0"] and second.split()[-2:] == ["158", "7"]
    assert results_table({"a": {"test": replace(result, num_skipped=2)}}).split()[-2:] == ["158", "2"]


def test_a_summary_is_plain_json():
    value = to_jsonable({"summary": summarize([ONE])})
    assert value["summary"]["rouge_l"] == {"mean": 10.0, "std": None, "num_values": 1}
