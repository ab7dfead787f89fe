"""The evaluation protocol that MiniLLM set and the paper uses (method.md section 8): what is evaluated, and one pass
over it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megadistill.data.dataset import Example, FieldNames, load_examples
from megadistill.data.tokenize import TokenizedExample, tokenize_examples
from megadistill.errors import ConfigError, DataError
from megadistill.evaluation.report import Summary, summarise
from megadistill.evaluation.rouge import RougeScores, score_texts

SEEDS = (10, 20, 30, 40, 50)

# Rows and the seed of a sampled pass, or None for a greedy one -> one text a row, in order.
Generate = Callable[[Sequence[TokenizedExample], int | None], list[str]]


@dataclass(frozen=True)
class SuiteSpec:
    """Which rows of a published set a suite takes: references of at least `min_reference_words` words, then the first
    `max_rows`.
    """

    title: str
    min_reference_words: int = 0
    max_rows: int | None = None


SUITES: dict[str, SuiteSpec] = {
    "dolly": SuiteSpec("DollyEval"),
    "self_inst": SuiteSpec("Self-Instruct"),
    "vicuna": SuiteSpec("Vicuna"),
    "sni": SuiteSpec("Super-Natural Instructions", min_reference_words=11),
    "unni": SuiteSpec("Unnatural Instructions", min_reference_words=11, max_rows=10_000),
}


@dataclass(frozen=True)
class EvalSet:
    """Rows to evaluate, and what was left out: `num_skipped` bad rows, `num_dropped` prompts over the limit."""

    name: str
    rows: list[TokenizedExample]
    num_skipped: int = 0
    num_dropped: int = 0
    num_truncated: int = 0

    @property
    def num_without_references(self) -> int:
        return sum(not row.references for row in self.rows)

    def head(self, max_rows: int | None) -> EvalSet:
        return self if max_rows is None else replace(self, rows=self.rows[:max_rows])


@dataclass(frozen=True)
class SuiteResult:
    """Scores of one model on one set. `predictions` are the greedy texts, or the first seed's where nothing was decoded
    greedily.
    """

    name: str
    sampled: Summary | None
    greedy: RougeScores | None
    seeds: tuple[int, ...]
    num_skipped: int
    num_dropped: int
    predictions: list[str]


def select_rows(examples: Sequence[Example], spec: SuiteSpec) -> list[Example]:
    """The suite's rows of a set, in order. The length is that of the first reference; without one it is 0."""
    long_enough = [row for row in examples if len((row.references or ("",))[0].split()) >= spec.min_reference_words]
    return long_enough[: spec.max_rows]


def load_eval_set(
    path: str | Path,
    tokenizer: Any,
    *,
    name: str | None = None,
    suite: str | None = None,
    template: str = "alpaca",
    max_prompt_tokens: int = 256,
    max_tokens: int = 512,
    long_prompt: str = "drop",
    max_rows: int | None = None,
    fields: FieldNames | None = None,
    split: str = "train",
    config_name: str | None = None,
    skip_bad_rows: bool = False,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> EvalSet:
    """Read and tokenise an evaluation set exactly as training data is.

    Raises:
        ConfigError: unknown `suite`.
        DataError: unreadable data, a bad row, or nothing left to evaluate.
    """
    if suite is not None and suite not in SUITES:
        raise ConfigError(f"unknown suite {suite!r}; allowed: {', '.join(SUITES)}")
    loaded = load_examples(
        path, fields=fields, split=split, config_name=config_name, skip_bad_rows=skip_bad_rows, progress=progress
    )
    chosen = select_rows(loaded.examples, replace(SUITES.get(suite or "", SuiteSpec("")), max_rows=None))
    tokenized = tokenize_examples(
        chosen,
        tokenizer,
        template=template,
        max_prompt_tokens=max_prompt_tokens,
        max_tokens=max_tokens,
        long_prompt=long_prompt,
    )
    limits = [limit for limit in (max_rows, SUITES[suite].max_rows if suite else None) if limit is not None]
    eval_set = EvalSet(
        name or suite or Path(path).stem,
        tokenized.rows,
        num_skipped=len(loaded.skipped),
        num_dropped=tokenized.num_dropped,
        num_truncated=tokenized.num_truncated,
    ).head(min(limits) if limits else None)
    if not eval_set.rows:
        left_out = (
            f"{len(loaded.examples) - len(chosen)} of {len(loaded.examples)} rows are too short for suite {suite!r}"
        )
        reason = left_out if suite and not chosen else f"eval.max_rows={max_rows}"
        raise DataError(f"{path}: the evaluation set is empty ({reason})")
    return eval_set


def run_suite(
    eval_set: EvalSet, generate: Generate, *, seeds: Sequence[int] = SEEDS, greedy: bool = True
) -> SuiteResult:
    """Generate for every seed (and once greedily), and score.

    `generate` is called in the same order on every rank and must return the texts of all rows on each.

    Raises:
        ConfigError: neither seeds nor greedy.
        DataError: the set is empty.
    """
    if not seeds and not greedy:
        raise ConfigError("nothing to evaluate: eval.seeds is empty and eval.greedy is false")
    if not eval_set.rows:
        raise DataError(f"{eval_set.name}: the evaluation set is empty")
    references = [row.references for row in eval_set.rows]
    texts_by_pass = {seed: generate(eval_set.rows, seed) for seed in [*seeds, *([None] if greedy else [])]}
    scores = {seed: score_texts(texts, references) for seed, texts in texts_by_pass.items()}
    return SuiteResult(
        name=eval_set.name,
        sampled=summarise([scores[seed] for seed in seeds]) if seeds else None,
        greedy=scores.get(None),
        seeds=tuple(seeds),
        num_skipped=eval_set.num_skipped,
        num_dropped=eval_set.num_dropped,
        predictions=texts_by_pass[None if greedy else seeds[0]],
    )
