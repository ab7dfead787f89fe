"""``megadistill compare A B``: answers of several models to the same prompts, side by side."""

from __future__ import annotations

import json
import shutil
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadistill.cli.generate_options import (
    add_prompts,
    add_rows,
    add_run,
    add_sampling,
    add_tokens,
    check_standard_input,
)
from megadistill.cli.parsing import Parser, named_paths, refuse_unwritable
from megadistill.errors import ConfigError
from megadistill.files import write_atomically

if TYPE_CHECKING:
    from megadistill.cli.generate import Lines
    from megadistill.data.dataset import LoadedExamples
    from megadistill.evaluation.side_by_side import Compared

_FORMATS = (".txt", ".md", ".jsonl")


def run(arguments: Sequence[str]) -> int:
    """Runs the verb; returns its exit code."""
    parsed = _parser().parse(arguments)
    models = named_paths(parsed.models)
    if len(models) < 2:
        raise ConfigError(f"two models or more are compared, and one is given: {', '.join(models)}")
    _check_output(parsed)
    from megadistill.checkpoint.model_folder import model_folder
    from megadistill.cli.generate import answer_rows
    from megadistill.cli.generate_rows import read_prompts
    from megadistill.config.parallel import ParallelSection
    from megadistill.evaluation.processes import inference_context

    output, collected = sys.stdout, {name: _Collected() for name in models}
    with redirect_stdout(sys.stderr):
        folders = {name: model_folder(path) for name, path in models.items()}
        with inference_context(ParallelSection(tp_size=parsed.tp_size or "auto"), folders) as context:
            check_standard_input(parsed, context.world_size)
            loaded = read_prompts(parsed)
            for name, path in models.items():
                if context.is_rank0:
                    print(f"{name}: {path}", file=sys.stderr)
                answer_rows(Namespace(**{**vars(parsed), "model": path}), collected[name].begin, loaded, context)
            is_rank0 = context.is_rank0
    if is_rank0:
        with redirect_stdout(output):
            _show(_rows(loaded, collected), parsed)
    return 0


def _parser() -> Parser:
    parser = Parser(
        "compare",
        "Answers the same prompts with several models and shows the answers side by side: greedy, unless\n"
        "--temperature says otherwise, each model with the template and limits of its own run.",
        "examples:\n"
        "  megadistill compare before=STUDENT after=runs/demo --input data/demo/valid.jsonl\n"
        "  megadistill compare runs/a runs/b --prompt 'Name a river.' --output answers.md",
    )
    parser.add_argument(
        "models", nargs="+", metavar="[NAME=]MODEL", help="model folder, hub name, checkpoint or run directory"
    )
    add_prompts(parser)
    parser.add_argument(
        "--output", metavar="FILE", help=f"where to write ({', '.join(_FORMATS)}); default: the terminal, as text"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    add_tokens(parser)
    add_run(parser)
    add_rows(parser)
    add_sampling(parser, temperature=0.0)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    return parser


def _check_output(parsed: Namespace) -> None:
    if parsed.output is None:
        return
    if Path(parsed.output).suffix.lower() not in _FORMATS:
        raise ConfigError(f"--output {parsed.output}: the name must end in {', '.join(_FORMATS)}")
    refuse_unwritable(parsed.output, is_file=True)
    if Path(parsed.output).exists() and not parsed.overwrite:
        raise ConfigError(f"--output {parsed.output} exists already; --overwrite replaces it")


class _Collected:
    """Implements ``cli.resumable.RowWriter``: keeps the answers of one model.

    Attributes:
        prompts: Number of a row -> what the model read.
        responses: Number of a row -> its answer.
    """

    def __init__(self) -> None:
        self.prompts: dict[int, str] = {}
        self.responses: dict[int, str] = {}
        self._lines: Lines | None = None

    def begin(self, lines: Lines) -> _Collected:
        """What ``answer_rows`` calls with the rows that it will answer."""
        self._lines = lines
        return self

    def open(self, settings: Mapping[str, Any]) -> int:
        """Nothing is there yet."""
        return 0

    def write(self, lines: Sequence[str]) -> None:
        """Keeps the answers of the next rows."""
        assert self._lines is not None
        for row, line in zip(self._lines.rows[len(self.responses) :], lines, strict=False):
            self.prompts[row.id], self.responses[row.id] = row.prompt, json.loads(line)[self._lines.response_name]

    def finish(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


def _rows(loaded: LoadedExamples, collected: Mapping[str, _Collected]) -> list[Compared]:
    from megadistill.data.columns import joined
    from megadistill.evaluation.side_by_side import Compared

    return [
        Compared(
            example.id if example.row.get("id") is None else example.row["id"],
            joined(example.instruction, example.input),
            {name: answers.responses.get(example.id) for name, answers in collected.items()},
            example.references,
            example.row,
            {name: answers.prompts[example.id] for name, answers in collected.items() if example.id in answers.prompts},
        )
        for example in loaded.examples
    ]


def _show(rows: Sequence[Compared], parsed: Namespace) -> None:
    from megadistill.evaluation.side_by_side import as_json_lines, as_markdown, as_text, summary

    if parsed.output is None:
        print(as_text(rows, shutil.get_terminal_size().columns))
        return
    kind = Path(parsed.output).suffix.lower()
    text = {".txt": lambda: as_text(rows, 120), ".md": lambda: as_markdown(rows), ".jsonl": lambda: as_json_lines(rows)}
    Path(parsed.output).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(parsed.output, text[kind]() + "\n")
    print(f"{summary(rows)}; written to {parsed.output}")
