"""Means and deviations over seeds, and tables of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megadistill.errors import DataError
from megadistill.evaluation.rouge import RougeScores

METRICS = ("rouge_l", "exact_match", "distinct_1", "distinct_2")


@dataclass(frozen=True)
class MeanStd:
    """Mean and sample standard deviation (n - 1) of ``num_values`` values; one value has no deviation: None."""

    mean: float
    std: float | None
    num_values: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.std is None else f"{self.mean:.2f} ± {self.std:.2f}"


@dataclass(frozen=True)
class Summary:
    """Scores over seeds; a metric is None where no row has references."""

    rouge_l: MeanStd | None
    exact_match: MeanStd | None
    distinct_1: MeanStd | None
    distinct_2: MeanStd | None
    num_scored: int
    num_without_references: int


def mean_std(values: Sequence[float]) -> MeanStd:
    """Mean and deviation; both sums are exactly rounded, so the order of values does not matter.

    Raises:
        DataError: No values.
    """
    if not values:
        raise DataError("no values to average")
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return MeanStd(mean, math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else None, len(values))


def summarize(scores: Sequence[RougeScores]) -> Summary:
    """Mean and deviation of one score per seed, all of the same rows.

    Raises:
        DataError: No scores, or scores of different numbers of rows.
    """
    if not scores:
        raise DataError("no scores to summarize")
    counts = {(each.num_scored, each.num_without_references) for each in scores}
    if len(counts) > 1:
        raise DataError(f"scores of different sets cannot be averaged: (scored, without references) = {sorted(counts)}")
    columns = {name: [getattr(each, name) for each in scores] for name in METRICS}
    known = {name: [value for value in values if value is not None] for name, values in columns.items()}
    return Summary(
        **{name: mean_std(values) if values else None for name, values in known.items()},
        num_scored=scores[0].num_scored,
        num_without_references=scores[0].num_without_references,
    )


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A plain table: first column left-aligned, the others right-aligned; None is -, floats have two places."""
    cells = [list(header)] + [[_cell(value) for value in row] for row in rows]
    assert all(len(row) == len(header) for row in cells), "every row needs a cell for every column"
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in cells)
    ]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join(line.rstrip() for line in [lines[0], rule, *lines[1:]])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def results_table(
    results: Mapping[str, Mapping[str, Any]], nll: Mapping[str, Mapping[str, float]] | None = None
) -> str:
    """The table of an evaluation; sampled columns hold mean ± standard deviation over seeds.

    Distinct words are those of the sampled answers, of the greedy ones where none were sampled. Truncated prompts and
    bad rows have a column where there are any.

    Args:
        results: Model -> suite -> SuiteResult.
        nll: Model -> suite -> nats per reference token.
    """
    each = [(model, suite, result) for model, suites in results.items() for suite, result in suites.items()]
    counted = {"dropped": "num_dropped", "truncated": "num_truncated", "bad rows": "num_skipped"}
    shown = {
        title: field
        for title, field in counted.items()
        if title == "dropped" or any(getattr(result, field) for *_, result in each)
    }
    header = [
        "model", "set", "ROUGE-L sampled", "exact sampled", "ROUGE-L greedy", "exact greedy", "NLL", "distinct-1",
        "distinct-2", "scored", "no reference", *shown,
    ]  # fmt: skip
    rows = []
    for model, suite, result in each:
        any_scores = result.sampled or result.greedy
        rows.append(
            [
                model,
                suite,
                result.sampled and result.sampled.rouge_l,
                result.sampled and result.sampled.exact_match,
                result.greedy and result.greedy.rouge_l,
                result.greedy and result.greedy.exact_match,
                (nll or {}).get(model, {}).get(suite),
                any_scores.distinct_1,
                any_scores.distinct_2,
                any_scores.num_scored,
                any_scores.num_without_references,
                *(getattr(result, field) for field in shown.values()),
            ]
        )
    return text_table(header, rows)
