"""Scores of generated texts against references: ROUGE-L, exact match, distinct n-grams. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from megadistill.errors import DataError, needs_extra


@dataclass(frozen=True)
class RougeScores:
    """Means over the rows that have references, in percent; None where no row has any.

    Attributes:
        rouge_l: ROUGE-L.
        exact_match: Share of exact matches.
        distinct_1: Distinct words of all predictions in percent of their number: shows repetition, as ROUGE-L does not.
        distinct_2: The same of pairs of words.
        num_scored: Rows with references.
        num_without_references: Rows without.
    """

    rouge_l: float | None
    exact_match: float | None
    distinct_1: float | None
    distinct_2: float | None
    num_scored: int
    num_without_references: int


def score_texts(predictions: Sequence[str], references: Sequence[tuple[str, ...]]) -> RougeScores:
    """Scores each prediction against the best of its references. Rows without references are counted, not scored.

    ROUGE-L is the F-measure of ``rouge_score`` with the Porter stemmer, as in MiniLLM. That package reads only words of
    a-z and 0-9: in other scripts ROUGE-L is 0, and exact match is the measure to look at.

    Raises:
        DataError: There is nothing to score.
    """
    assert len(predictions) == len(references), f"{len(predictions)} predictions for {len(references)} rows"
    if not predictions:
        raise DataError("the evaluation set is empty: there is nothing to score")
    scored = [(text, refs) for text, refs in zip(predictions, references, strict=True) if refs]
    rouge = [rouge_l(text, refs) for text, refs in scored]
    exact = [100.0 * is_exact_match(text, refs) for text, refs in scored]
    return RougeScores(
        rouge_l=_mean(rouge),
        exact_match=_mean(exact),
        distinct_1=distinct_n(predictions, 1),
        distinct_2=distinct_n(predictions, 2),
        num_scored=len(scored),
        num_without_references=len(predictions) - len(scored),
    )


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """The largest ROUGE-L F-measure over ``references``, in percent."""
    return 100.0 * max(load_scorer().score(reference, prediction)["rougeL"].fmeasure for reference in references)


@cache
def load_scorer() -> Any:
    """The ROUGE-L scorer, loaded once. Raises ConfigError without its package."""
    with needs_extra("eval", "ROUGE-L"):
        from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def is_exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether a prediction equals one of ``references``, ignoring white space but not case and punctuation."""
    normal = " ".join(prediction.split())
    return any(normal == " ".join(reference.split()) for reference in references)


def distinct_n(texts: Sequence[str], n: int) -> float | None:
    """Distinct word n-grams of all texts in percent of their number (Li et al., 2016); None without any."""
    grams = [tuple(words[at : at + n]) for words in map(str.split, texts) for at in range(len(words) - n + 1)]
    return 100.0 * len(set(grams)) / len(grams) if grams else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
