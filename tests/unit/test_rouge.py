"""RougeScores against values worked out by hand."""

import pytest

from megadistill.errors import DataError
from megadistill.evaluation.perplexity import LikelihoodTotal, total_likelihood
from megadistill.evaluation.rouge import RougeScores, distinct_n, is_exact_match, rouge_l, score_texts


def test_rouge_l_by_hand():
    # Longest common subsequence "the cat the mat" = 4 of 6 words on each side.
    assert rouge_l("the cat lay under the mat", ("the cat sat on the mat",)) == pytest.approx(100 * 4 / 6)
    # 2 of 2 predicted words, 2 of 4 reference words: F = 2 * 1 * 0.5 / 1.5.
    assert rouge_l("a b", ("a b c d",)) == pytest.approx(100 * 2 / 3)
    assert rouge_l("", ("a",)) == 0.0


def test_rouge_l_stems_and_ignores_case_and_punctuation():
    assert rouge_l("Running DOGS!", ("run dog",)) == pytest.approx(100.0)


def test_the_best_reference_counts():
    assert rouge_l("a b", ("x y", "a b c d", "a b")) == pytest.approx(100.0)
    assert is_exact_match("b", ("a", "b"))


def test_exact_match_ignores_white_space_only():
    assert is_exact_match("  one\n two ", ("one two",))
    assert not is_exact_match("One two", ("one two",))
    assert not is_exact_match("one two.", ("one two",))
    assert is_exact_match("", ("",))


def test_rows_without_references_are_counted_and_not_scored_as_zero():
    scores = score_texts(["a b", "c", "d"], [("a b",), (), ("x",)])
    assert scores == RougeScores(
        rouge_l=pytest.approx(50.0),
        exact_match=50.0,
        distinct_1=100.0,
        distinct_2=100.0,
        num_scored=2,
        num_without_references=1,
    )
    none = score_texts(["a"], [()])
    assert (none.rouge_l, none.exact_match, none.num_scored, none.num_without_references) == (None, None, 0, 1)


def test_nothing_to_score():
    with pytest.raises(DataError, match="the evaluation set is empty"):
        score_texts([], [])
    with pytest.raises(AssertionError):
        score_texts(["a"], [])


def test_distinct_n():
    assert distinct_n(["a a b", "a b"], 1) == pytest.approx(100 * 2 / 5)
    assert distinct_n(["a a b", "a b"], 2) == pytest.approx(100 * 2 / 3)
    assert distinct_n(["a"], 2) is None


def test_likelihood_is_a_sum_over_a_count_whatever_the_parts():
    parts = [LikelihoodTotal(10.0, 4, 1), LikelihoodTotal(2.0, 8, 2), LikelihoodTotal()]
    total = total_likelihood(parts)
    assert total == parts[0] + parts[1] + parts[2] == total_likelihood(reversed(parts))
    assert total.nll == pytest.approx(1.0)
    with pytest.raises(DataError, match="no row of the evaluation set has a reference"):
        _ = total_likelihood([]).nll
