"""How diverse the text of a run is, before and after SCRG."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from megadistill.cli.parsing import refuse_unwritable
from megadistill.errors import DataError, MegadistillError
from megadistill.evaluation.rouge import distinct_n
from megadistill.generation.scrg import NO_ERROR
from tools.benchmarks.measure import at_least, save

_KEYS: dict[str, type] = {"step": int, "student": str, "corrected": str, "error_position": int}
_LEGEND = """\
From samples.jsonl. Corrected: share of rows with a correction; changed: share of rows whose text it changed.
Position: tokens before the first correction, mean over the corrected rows; relative: share of the characters that the
student wrote before the first changed one, mean over the changed rows. Words: mean number per row, by white space.
Distinct-1, 2, 3: different n-grams over all n-grams of the rows of the line, as the student wrote them and after SCRG.
Distinct-n falls with the number of words, so only lines with about as many rows and words compare: quarters with
quarters, "all" with "all". Misspelt words count as different words: more distinct is not better by itself."""


@dataclass(frozen=True)
class Sample:
    """What is read of a line of samples.jsonl."""

    step: int
    student: str
    corrected: str
    error_position: int


@dataclass(frozen=True)
class Row:
    """One line of the table. None: nothing to average."""

    run: str
    part: str
    first_step: int
    last_step: int
    rows: int
    corrected_share: float
    changed_share: float
    error_position: float | None
    relative_position: float | None
    student_words: float
    corrected_words: float
    student_distinct: list[float | None]
    corrected_distinct: list[float | None]


def main(arguments: list[str]) -> int:
    """Reads every run and prints the table; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        if options.output:
            for file in (options.output, options.output.with_suffix(".md")):
                refuse_unwritable(file, is_file=True)
        rows = [row for run in options.runs for row in rows_of(run, read_samples(Path(run)), options.parts)]
    except MegadistillError as error:
        print(f"benchmark.py diversity: {error}", file=sys.stderr)
        return error.exit_code
    command = "python tools/benchmark.py diversity " + shlex.join(arguments)
    text = table(rows, command)
    if options.output:
        save(options.output, {"command": command, "rows": [asdict(row) for row in rows]}, text)
    print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmark.py diversity", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run directory, trained with train.samples_every=1 and "
        "train.samples_rows=train.global_batch_size, so that samples.jsonl has all text"
    )  # fmt: skip
    parser.add_argument("--parts", type=at_least(1), default=4, metavar="N", help="equal parts of a run's steps")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file; the table goes beside it as .md")
    return parser


def read_samples(run: Path) -> list[Sample]:
    """All rows of a run directory's samples.jsonl. Raises DataError where it is missing, empty or damaged."""
    path = run / "samples.jsonl"
    if not run.is_dir():
        raise DataError(f"{run}: no such run directory")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; train.samples_every=1 makes a run write it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    # Not splitlines: texts may hold characters that it takes for line ends.
    lines = text.removesuffix("\n").split("\n") if text else []
    if not lines:
        raise DataError(f"{path} is empty; train.samples_every=1 makes a run write every step's text to it")
    return [_sample(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _sample(line: str, where: str) -> Sample:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is damaged: {error}") from None
    for key, kind in _KEYS.items():
        value = row.get(key) if isinstance(row, dict) else None
        if type(value) is not kind:
            raise DataError(f"{where} is damaged: '{key}' is not there or not of type {kind.__name__}")
    return Sample(**{key: row[key] for key in _KEYS})


def rows_of(run: str, samples: Sequence[Sample], parts: int) -> list[Row]:
    """A line for each part of the run's steps (no more parts than steps), and one for all of them."""
    steps = sorted({sample.step for sample in samples})
    parts = min(parts, len(steps))
    rows = []
    for part in range(parts):
        mine = set(steps[part * len(steps) // parts : (part + 1) * len(steps) // parts])
        rows.append(row_of(run, f"{part + 1}/{parts}", [sample for sample in samples if sample.step in mine]))
    return rows if parts == 1 else [*rows, row_of(run, "all", samples)]


def row_of(run: str, part: str, samples: Sequence[Sample]) -> Row:
    """The numbers of one part."""
    corrected = [sample.error_position for sample in samples if sample.error_position != NO_ERROR]
    changed = [sample for sample in samples if sample.corrected != sample.student]
    return Row(
        run,
        part,
        first_step=min(sample.step for sample in samples),
        last_step=max(sample.step for sample in samples),
        rows=len(samples),
        corrected_share=len(corrected) / len(samples),
        changed_share=len(changed) / len(samples),
        error_position=_mean(corrected),
        relative_position=_mean([relative_position(s.student, s.corrected) for s in changed if s.student]),
        student_words=fmean(len(sample.student.split()) for sample in samples),
        corrected_words=fmean(len(sample.corrected.split()) for sample in samples),
        student_distinct=distinct([sample.student for sample in samples]),
        corrected_distinct=distinct([sample.corrected for sample in samples]),
    )


def relative_position(student: str, corrected: str) -> float:
    """Share of the characters of ``student``, which has some, before the first that differs in ``corrected``."""
    return len(os.path.commonprefix([student, corrected])) / len(student)


def distinct(texts: Sequence[str]) -> list[float | None]:
    """Distinct-1, 2, 3 over all texts: different n-grams of words over n-grams; None where no text has n words."""
    return [None if (percent := distinct_n(texts, n)) is None else percent / 100 for n in (1, 2, 3)]


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def table(rows: Sequence[Row], command: str) -> str:
    """Markdown, one table per run."""
    header = ["part", "steps", "rows", "corrected", "changed", "position", "relative"]
    header += ["words written", "after SCRG", "distinct-1, 2, 3 written", "after SCRG"]
    lines = [f"`{command}`", "", _LEGEND]
    for run in dict.fromkeys(row.run for row in rows):
        lines += ["", f"{run}", "", _line(header), "|---" * len(header) + "|"]
        lines += [_line(_cells(row)) for row in rows if row.run == run]
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(row: Row) -> list[str]:
    return [
        row.part,
        f"{row.first_step}-{row.last_step}",
        str(row.rows),
        _shown(row.corrected_share, 2),
        _shown(row.changed_share, 2),
        _shown(row.error_position, 1),
        _shown(row.relative_position, 2),
        _shown(row.student_words, 1),
        _shown(row.corrected_words, 1),
        ", ".join(_shown(value, 3) for value in row.student_distinct),
        ", ".join(_shown(value, 3) for value in row.corrected_distinct),
    ]


def _shown(value: float | None, places: int) -> str:
    return "-" if value is None else f"{value:.{places}f}"
