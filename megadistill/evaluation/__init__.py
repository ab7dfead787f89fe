"""The evaluation protocol of MiniLLM: sets, scores, likelihood, reports."""

from megadistill.evaluation.perplexity import LikelihoodTotal, total_likelihood
from megadistill.evaluation.report import (
    MeanStd,
    Summary,
    mean_std,
    results_table,
    summarize,
    text_table,
)
from megadistill.evaluation.rouge import RougeScores, score_texts
from megadistill.evaluation.suites import SUITES, EvalSet, SuiteResult, load_eval_set, run_suite, select_rows

__all__ = [
    "SUITES",
    "EvalSet",
    "LikelihoodTotal",
    "MeanStd",
    "RougeScores",
    "SuiteResult",
    "Summary",
    "load_eval_set",
    "mean_std",
    "results_table",
    "run_suite",
    "score_texts",
    "select_rows",
    "summarize",
    "text_table",
    "total_likelihood",
]
