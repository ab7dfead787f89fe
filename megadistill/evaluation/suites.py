"""MiniLLM's evaluation protocol, which the paper uses (docs/method.md, section 8): its sets, and a pass over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megadistill.config.data import DataSection
from megadistill.data.dataset import Example, read_examples
from megadistill.data.encode import TokenizedExample, tokenize_examples
from megadistill.data.prompts import PromptSettings
from megadistill.errors import ConfigError, DataError
from megadistill.evaluation.report import Summary, summarize
from megadistill.evaluation.rouge import RougeScores, score_texts
from megadistill.files import checksum, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Rows and the seed of a sampled pass, or None for a greedy one -> one text per row, in order.
Generate = Callable[[Sequence[TokenizedExample], int | None], list[str]]


@dataclass(frozen=True)
class SuiteSpec:
    """The rows of a published set that a suite takes.

    Attributes:
        min_reference_words: Shortest first reference.
        max_rows: Number of rows, the first of those; None: all.
    """

    min_reference_words: int = 0
    max_rows: int | None = None


SUITES: dict[str, SuiteSpec] = {
    "dolly": SuiteSpec(),  # DollyEval
    "self_inst": SuiteSpec(),  # Self-Instruct
    "vicuna": SuiteSpec(),
    "sni": SuiteSpec(min_reference_words=11),  # Super-Natural Instructions
    "unni": SuiteSpec(min_reference_words=11, max_rows=10_000),  # Unnatural Instructions
}


@dataclass(frozen=True)
class EvalSet:
    """Rows to evaluate, the numbers of bad rows, dropped prompts and truncated prompts, and what ends a reference."""

    name: str
    rows: list[TokenizedExample]
    num_skipped: int = 0
    num_dropped: int = 0
    num_truncated: int = 0
    end_id: int = field(kw_only=True)

    @property
    def num_without_references(self) -> int:
        """Rows that are answered but not scored."""
        return sum(not row.references for row in self.rows)

    def head(self, max_rows: int | None) -> EvalSet:
        """The first rows; all of them where ``max_rows`` is None."""
        return self if max_rows is None else replace(self, rows=self.rows[:max_rows])


@dataclass(frozen=True)
class SuiteResult:
    """Scores of one model on one set.

    Attributes:
        name: Name of the set.
        sampled: Scores over seeds, or None.
        greedy: Scores of greedy answers, or None.
        seeds: The seeds.
        num_skipped: Bad rows.
        num_dropped: Rows of the file with too long a prompt.
        predictions: The greedy texts of all rows; without them, those of the first seed.
        num_truncated: Prompts that were cut.
        rows_checksum: Of the rows that were answered: their numbers and references, whatever the tokenizer.
        prompts_checksum: Of the rows as the model read them.
    """

    name: str
    sampled: Summary | None
    greedy: RougeScores | None
    seeds: tuple[int, ...]
    num_skipped: int
    num_dropped: int
    predictions: list[str]
    num_truncated: int = 0
    rows_checksum: str = ""
    prompts_checksum: str = ""


def select_rows(examples: Sequence[Example], spec: SuiteSpec) -> list[Example]:
    """The suite's rows of a set, in order. A row without references has 0 words."""
    long_enough = [row for row in examples if len((row.references or ("",))[0].split()) >= spec.min_reference_words]
    return long_enough[: spec.max_rows]


def load_eval_set(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    data: DataSection,
    *,
    name: str | None = None,
    suite: str | None = None,
    max_rows: int | None = None,
) -> EvalSet:
    """Reads and tokenizes an evaluation set exactly as training data is.

    Args:
        path: A file, a folder or a hub name.
        tokenizer: That of the model to evaluate.
        data: Columns, template and limits.
        name: Name of the set in tables; default: the suite's, else the file's.
        suite: A key of SUITES, whose rows are taken; None: all rows.
        max_rows: Take the first rows only; None: all.

    Raises:
        ConfigError: Unknown ``suite``.
        DataError: Unreadable data, a bad row, or nothing left to evaluate.
    """
    if suite is not None and suite not in SUITES:
        raise ConfigError(f"unknown suite {suite!r}; allowed: {', '.join(SUITES)}{did_you_mean(suite, SUITES)}")
    spec = SuiteSpec() if suite is None else SUITES[suite]
    loaded = read_examples(path, data)
    chosen = select_rows(loaded.examples, replace(spec, max_rows=None))
    tokenized = tokenize_examples(
        chosen,
        tokenizer,
        PromptSettings.of(data),
    )
    limits = [limit for limit in (max_rows, spec.max_rows) if limit is not None]
    eval_set = EvalSet(
        name or suite or Path(path).stem,
        tokenized.rows,
        num_skipped=len(loaded.skipped) + len(tokenized.skipped),
        num_dropped=tokenized.num_dropped,
        num_truncated=tokenized.num_truncated,
        end_id=tokenized.end_id,
    ).head(min(limits) if limits else None)
    if not eval_set.rows:
        num_short = len(loaded.examples) - len(chosen)
        reason = f"{num_short} of {len(loaded.examples)} rows are too short for suite {suite!r}" if num_short else ""
        raise DataError(f"{path}: the evaluation set is empty ({reason or f'at most {max_rows} rows were asked for'})")
    return eval_set


def run_suite(eval_set: EvalSet, generate: Generate, *, seeds: Sequence[int], greedy: bool = True) -> SuiteResult:
    """Generates answers with every seed (and once greedily), and scores them.

    Args:
        eval_set: The rows.
        generate: Called in the same order on every rank; must return the texts of all rows on each.
        seeds: Seeds of the sampled answers.
        greedy: Also evaluate greedy answers.

    Raises:
        ConfigError: Neither seeds nor greedy.
        DataError: The set is empty.
    """
    if not seeds and not greedy:
        raise ConfigError("nothing to evaluate: no seeds and no greedy answers", setting="eval.seeds, eval.greedy")
    if not eval_set.rows:
        raise DataError(f"{eval_set.name}: the evaluation set is empty")
    references = [row.references for row in eval_set.rows]
    texts_by_pass = {seed: generate(eval_set.rows, seed) for seed in [*seeds, *([None] if greedy else [])]}
    scores = {seed: score_texts(texts, references) for seed, texts in texts_by_pass.items()}
    return SuiteResult(
        name=eval_set.name,
        sampled=summarize([scores[seed] for seed in seeds]) if seeds else None,
        greedy=scores.get(None),
        seeds=tuple(seeds),
        num_skipped=eval_set.num_skipped,
        num_dropped=eval_set.num_dropped,
        predictions=texts_by_pass[None if greedy else seeds[0]],
        num_truncated=eval_set.num_truncated,
        rows_checksum=checksum([[row.id, row.references] for row in eval_set.rows]),
        prompts_checksum=checksum([[row.id, row.prompt_ids, row.references] for row in eval_set.rows]),
    )
