"""Reads instruction rows from JSONL, JSON, CSV, TSV, Parquet, a ``datasets`` folder or a hub name.

Every error about a row names its file and line.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megadistill.data.hub import check_name, offline_if_unreachable
from megadistill.errors import DataError
from megadistill.files import did_you_mean, did_you_mean_path, os_errors_as

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_MAX_CSV_FIELD_CHARS = 1 << 30


@dataclass(frozen=True)
class FieldNames:
    """Which keys (columns) of a row hold the instruction, its optional input and the reference output(s)."""

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"


@dataclass(frozen=True)
class Example:
    """One instruction row.

    Attributes:
        id: Number of the row, from 0.
        instruction: The instruction.
        input: Its input; empty for none.
        references: The reference answers; empty for a row with a prompt only.
        where: FILE:LINE, for messages.
    """

    id: int
    instruction: str
    input: str
    references: tuple[str, ...]
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class LoadedExamples:
    """Usable rows in file order, and one message per skipped row.

    ``Example.id`` counts bad rows, too: a row has the same id whether or not others are skipped.
    """

    examples: list[Example]
    skipped: list[str]


class _BadRow(Exception):
    """What is wrong with one row; the caller adds its place. ``setting``: the key that may fix it."""

    def __init__(self, message: str, setting: str | None = None) -> None:
        super().__init__(message)
        self.setting = setting


def load_examples(
    path: str | Path,
    *,
    fields: FieldNames | None = None,
    split: str = "train",
    config_name: str | None = None,
    skip_bad_rows: bool = False,
) -> LoadedExamples:
    """Reads every row of a local file (by suffix), a local ``datasets`` folder, or a hub data set.

    Args:
        path: A file, a folder or a hub name.
        fields: Names of the columns.
        split: Split of a folder or a hub data set.
        config_name: Configuration (subset) of a hub data set.
        skip_bad_rows: Count malformed rows instead of stopping at the first.

    Raises:
        DataError: The file is missing, unreadable or has no usable row; or a row is malformed, empty or of wrong types
            and ``skip_bad_rows`` is false.
    """
    fields = fields or FieldNames()
    rows = _open_rows(str(path), fields, split, config_name)
    examples: list[Example] = []
    skipped: list[str] = []
    absent = {name for name in (fields.input, fields.output) if name not in ("input", "output")}
    for row_id, (where, row) in enumerate(rows):
        absent -= row.keys() if isinstance(row, dict) else set()
        try:
            examples.append(_to_example(row, row_id, where, fields))
        except _BadRow as error:
            message = f"{where}: {error}"
            if not skip_bad_rows:
                settings = ", ".join(filter(None, (error.setting, "data.skip_bad_rows")))
                raise DataError(message, setting=settings) from None
            skipped.append(message)
    if not examples:
        reason = f"all {len(skipped)} rows are bad, the first: {skipped[0]}" if skipped else "it has no rows"
        raise DataError(f"{path}: no usable row: {reason}")
    if absent:
        # A column that the user named must exist: without this check, references would silently be missing.
        name = sorted(absent)[0]
        setting = "data.input_field" if name == fields.input else "data.output_field"
        raise DataError(f"{path}: no row has a field {name!r}", setting=setting)
    return LoadedExamples(examples, skipped)


def _to_example(row: Any, row_id: int, where: str, fields: FieldNames) -> Example:
    if isinstance(row, _BadRow):
        raise row
    if not isinstance(row, dict):
        raise _BadRow(f"a row must be an object with the field {fields.instruction!r}, not {_type_name(row)}")
    if fields.instruction not in row:
        names = [str(key) for key in row]
        hint = did_you_mean(fields.instruction, names)
        raise _BadRow(
            f"field {fields.instruction!r} is missing (fields: {', '.join(names) or 'none'}){hint}",
            setting="data.instruction_field",
        )
    instruction = _text(row[fields.instruction], fields.instruction)
    if not instruction.strip():
        raise _BadRow(f"field {fields.instruction!r} is empty")
    context = row.get(fields.input)
    output = row.get(fields.output)
    outputs = [] if output is None else list(output) if isinstance(output, list | tuple) else [output]
    texts = [_text(item, fields.output, "a string or a list of strings") for item in outputs]
    references = tuple(text for text in texts if text.strip())
    return Example(row_id, instruction, "" if context is None else _text(context, fields.input), references, where)


def _text(value: Any, name: str, allowed: str = "a string") -> str:
    if not isinstance(value, str):
        raise _BadRow(f"field {name!r} must be {allowed}, not {_type_name(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _BadRow(f"field {name!r} has a broken character at position {error.start} (invalid UTF-8)") from None
    return value


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _open_rows(path: str, fields: FieldNames, split: str, config_name: str | None) -> Iterator[tuple[str, Any]]:
    local = Path(path)
    if local.is_dir():
        # A file named after the split is read here, so that messages name its lines; ``datasets`` reads other folders.
        inside = [file for suffix in SUFFIXES if (file := local / f"{split}{suffix}").is_file()]
        if not inside:
            return _dataset_rows(path, fields, split, config_name)
        local = inside[0]
    check_name(path, error=DataError)
    if not local.exists():
        return _dataset_rows(path, fields, split, config_name)
    readers = {
        ".jsonl": _jsonl_rows,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".tsv": _csv_rows,
        ".parquet": _parquet_rows,
    }
    reader = readers.get(local.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: unknown file type {local.suffix!r}; allowed: {', '.join(SUFFIXES)}, a folder or a hub name"
        )
    if not local.is_file() or local.stat().st_size == 0:
        raise DataError(f"{local}: the file is empty" if local.is_file() else f"{local}: not a file")
    with os_errors_as(DataError, local, "cannot be read"):
        local.open("rb").close()
    return reader(local, fields)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return _BadRow(f"not valid JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return _BadRow(f"not valid JSON: {error}")


def _jsonl_rows(path: Path, fields: FieldNames) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield where, _BadRow(f"invalid UTF-8 at byte {error.start + 1} of the line")
                continue
            yield where, _parse(text) if text.strip() else _BadRow("the line is empty")


def _json_rows(path: Path, fields: FieldNames) -> Iterator[tuple[str, Any]]:
    """A list of rows with the line where each starts; a file that does not start with ``[`` is read line by line."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: invalid UTF-8; the rows of a JSON list cannot be skipped one by one") from None
    if not text.lstrip().startswith("["):
        yield from _jsonl_rows(path, fields)
        return
    decoder, blank = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")

    def skip_blank(position: int) -> int:
        match = blank.match(text, position)
        return match.end() if match else position

    position, line, counted = skip_blank(text.index("[") + 1), 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(f"{path}:{line}: not valid JSON: {reason}; the rest of the list cannot be read") from None
        yield f"{path}:{line}", row
        position = skip_blank(position)
        if text[position : position + 1] == ",":
            position = skip_blank(position + 1)
        elif text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            raise DataError(f"{path}:{line}: not valid JSON: a comma or a closing bracket is missing after a row")
    if text[position + 1 :].strip():
        raise DataError(f"{path}: not valid JSON: there is text after the closing bracket")


def _csv_rows(path: Path, fields: FieldNames) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(_MAX_CSV_FIELD_CHARS)
    # surrogateescape keeps a broken byte in its own row, where ``_text`` reports it.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        header: list[str] | None = None
        while True:
            where = f"{path}:{reader.line_num + 1}"
            try:
                values = next(reader, None)
            except csv.Error as error:
                raise DataError(f"{where}: not valid CSV: {error}") from None
            if values is None:
                return
            if header is None:
                header = values
                _require_column(header, fields, f"{where}: the header")
            elif not values:
                yield where, _BadRow("the line is empty")
            elif len(values) != len(header):
                yield where, _BadRow(f"{len(values)} fields where the header has {len(header)}")
            else:
                yield where, dict(zip(header, values, strict=True))


def _parquet_rows(path: Path, fields: FieldNames) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = table.schema_arrow.names
        _require_column(names, fields, f"{path}: the table")
        wanted = [name for name in (fields.instruction, fields.input, fields.output) if name in names]
        number = 0
        for batch in table.iter_batches(columns=wanted):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {_one_line(error)}") from None


def _require_column(names: list[str], fields: FieldNames, where: str) -> None:
    if fields.instruction not in names:
        hint = did_you_mean(fields.instruction, names)
        raise DataError(
            f"{where} has no column {fields.instruction!r} (columns: {', '.join(names)}){hint}",
            setting="data.instruction_field",
        )


def _dataset_rows(path: str, fields: FieldNames, split: str, config_name: str | None) -> Iterator[tuple[str, Any]]:
    """Rows through ``datasets``: a folder written by ``save_to_disk``, a folder of data files, or a hub name."""
    import datasets

    is_folder = Path(path).is_dir()
    is_offline = not is_folder and offline_if_unreachable()
    try:
        if is_folder and ((Path(path) / "state.json").exists() or (Path(path) / "dataset_dict.json").exists()):
            loaded = datasets.load_from_disk(path)
            table = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            table = datasets.load_dataset(path, name=config_name, split=split)
    # datasets raises errors of a dozen libraries (network, parsing, permissions); all mean that nothing can be read.
    except Exception as error:
        hub = "the hub cannot be reached" if is_offline else f"the hub did not provide it: {_one_line(error)}"
        what = f"the folder cannot be read: {_one_line(error)}" if is_folder else f"no such file or folder, and {hub}"
        near = "" if is_folder else did_you_mean_path(path)
        message = f"{path} (split {split!r}): {what}{near}"
        raise DataError(message, setting="data.hub_split, data.hub_config") from None
    _require_column(table.column_names, fields, f"{path} (split {split!r})")
    for number, row in enumerate(table, start=1):
        yield f"{path}[{split}]:row {number}", row


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
