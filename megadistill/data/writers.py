"""Rows to a file in the format that its name asks for."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megadistill.data.readers import GZIP, format_of
from megadistill.errors import ConfigError
from megadistill.files import write_atomically

OUTPUT_FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def output_format(path: Path, setting: str) -> str:
    """The format of a file to write: one of ``OUTPUT_FORMATS``; JSON lines for a name without a suffix.

    Args:
        path: The file.
        setting: What the user calls it, for the error.

    Raises:
        ConfigError: A suffix that says something else.
    """
    kind = format_of(path) or ".jsonl"
    if kind not in OUTPUT_FORMATS:
        raise ConfigError(
            f"{setting} {path}: cannot write {kind}; allowed: {', '.join(OUTPUT_FORMATS)} (text also as {GZIP})"
        )
    return kind


def convert_json_lines(source: Path, target: Path, kind: str) -> None:
    """Writes a file of JSON lines in another format; the source stays.

    Args:
        source: One JSON object a line.
        target: The file to write, atomically; compressed where its name ends in ``.gz``.
        kind: One of ``OUTPUT_FORMATS``.

    Raises:
        OSError: The file cannot be written.
        ConfigError: The rows do not fit the format.
    """
    with source.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    if kind == ".parquet":
        data = _parquet(rows, source, target)
    elif kind in (".csv", ".tsv"):
        data = _csv(rows, "," if kind == ".csv" else "\t").encode("utf-8")
    elif kind == ".json":
        data = (json.dumps(rows, indent=1, ensure_ascii=False) + "\n").encode("utf-8")
    else:
        data = source.read_bytes()
    if target.suffix.lower() == GZIP:
        data = gzip.compress(data, mtime=0)
    beside = target.with_name(target.name + ".converted")  # the source may have the name of atomic writes
    write_atomically(beside, data)
    beside.replace(target)


def _columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _csv(rows: list[dict[str, Any]], separator: str) -> str:
    """Text and numbers as they are, anything else as JSON."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(
        text, _columns(rows), delimiter=separator, lineterminator="\r\n"
    )  # else a "\r" would not be quoted
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {
                name: value if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)
                for name, value in row.items()
                if value is not None
            }
        )
    return text.getvalue()


def _parquet(rows: list[dict[str, Any]], source: Path, target: Path) -> bytes:
    import pyarrow
    import pyarrow.parquet

    columns = _columns(rows)
    try:
        table = pyarrow.Table.from_pydict({name: [row.get(name) for row in rows] for name in columns})
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(table, sink)
    except (pyarrow.ArrowException, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{target}: the rows do not fit into a Parquet table: {reason}; the rows are in {source}, as JSON lines"
        ) from None
    return bytes(sink.getvalue().to_pybytes())
