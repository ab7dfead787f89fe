#!/usr/bin/env python3
"""A picture of the spans that the span loss sees, on the references of a file of rows or on a given text.

python tools/show_spans.py data/train.jsonl --rows 5
python tools/show_spans.py --text "The fox sat on the mat." --verb-objects
python tools/show_spans.py data/train.jsonl --html spans.html
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megadistill.cli.parsing import refuse_unwritable, value_of
from megadistill.config.data import DataSection
from megadistill.config.section import PositiveInt
from megadistill.data.dataset import read_examples
from megadistill.data.span_picture import colored, page, plain
from megadistill.data.spans import SPAN_PRIORS, make_span_prior
from megadistill.errors import ConfigError, DataError, MegadistillError
from megadistill.files import write_atomically


def main(arguments: Sequence[str]) -> int:
    """Prints or writes the picture; returns the exit code."""
    try:
        _show(_parser().parse_args(arguments))
    except MegadistillError as error:
        print(f"show_spans.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="show_spans.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    number = value_of(PositiveInt)
    parser.add_argument("rows_file", nargs="?", metavar="ROWS", help="file of rows: their references are shown")
    parser.add_argument("--text", help="a text in place of rows")
    parser.add_argument("--rows", type=number, default=10, metavar="N", help="how many rows; default: 10")
    parser.add_argument("--prior", choices=SPAN_PRIORS, default="phrases", help="data.span_prior; default: phrases")
    parser.add_argument("--window", type=number, default=4, metavar="N", help="data.span_window; default: 4")
    parser.add_argument("--verb-objects", action="store_true", help="data.span_verb_objects")
    parser.add_argument("--html", metavar="FILE", help="write a page of HTML in place of printing")
    return parser


def _show(parsed: argparse.Namespace) -> None:
    if (parsed.rows_file is None) == (parsed.text is None):
        raise ConfigError("give either a file of rows or --text")
    if parsed.html:
        refuse_unwritable(parsed.html, is_file=True)
    prior = make_span_prior(parsed.prior, parsed.window, parsed.verb_objects)
    texts = [parsed.text] if parsed.text is not None else _references(parsed.rows_file, parsed.rows)
    rows = [(text, prior.spans(text)) for text in texts]
    if parsed.html:
        write_atomically(parsed.html, page(f"Spans of {parsed.rows_file or 'a text'} ({parsed.prior})", rows))
        print(f"written to {parsed.html}")
        return
    has_colors = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for text, spans in rows:
        print((colored if has_colors else plain)(text, spans))


def _references(path: str, number: int) -> list[str]:
    texts = [example.references[0] for example in read_examples(path, DataSection()).examples if example.references]
    if not texts:
        raise DataError(f"{path}: no row has a reference")
    return texts[:number]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
