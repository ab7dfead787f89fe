"""Reads files of rows, whatever their format: a row is an object (a mapping), and comes with its place in the file.

Formats: JSONL, JSON, CSV, TSV, text with an instruction on each line, each also compressed as ``.gz``; Parquet; folders
and hub data sets through ``datasets``. Text is UTF-8, or UTF-16 where the file begins with its byte-order mark. What
the columns mean is decided in ``data/columns.py``.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from bisect import bisect_right
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import IO, Any, cast

from megadistill.data.hub import check_name, offline_if_unreachable, split_revision
from megadistill.errors import DataError
from megadistill.files import did_you_mean_path, os_errors_as

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
GZIP = ".gz"
_MAX_CSV_FIELD_CHARS = 1 << 30
_SEPARATORS = {";": "semicolon", "\t": "tab", "|": "bar"}
Rows = Iterator[tuple[str, Any]]


class BadRow(Exception):
    """What is wrong with one row; the caller adds its place. ``setting``: the key that may fix it."""

    def __init__(self, message: str, setting: str | None = None) -> None:
        super().__init__(message)
        self.setting = setting


@dataclass(frozen=True)
class Start:
    """Where to begin to read: the row, from 0, and of files with a row on each line its byte, where that is known."""

    row: int = 0
    byte: int | None = None


def read_rows(path: str, split: str, config_name: str | None, start: Start | None = None) -> Rows:
    """Rows of a local file (by suffix), a local ``datasets`` folder, or a hub data set.

    Args:
        path: A file, a folder or a hub name.
        split: Split of a folder or a hub data set.
        config_name: Configuration (subset) of a hub data set.
        start: The first row to read; rows before it are skipped over.

    Yields:
        FILE:LINE, and the row; a ``BadRow`` in its place where it cannot be parsed.

    Raises:
        DataError: The file is missing or unreadable.
    """
    local, start = Path(path), start or Start()
    if local.is_dir():
        file = rows_file(path, split)
        if file is None:
            return _dataset_rows(path, split, config_name, start.row)
        local = file
    check_name(path, error=DataError)
    if not local.exists():
        return _dataset_rows(path, split, config_name, start.row)
    readers: dict[str, Callable[[Path, Start], Rows]] = {
        ".jsonl": _json_rows,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".tsv": _csv_rows,
        ".parquet": _parquet_rows,
        ".txt": _text_rows,
    }
    reader = readers.get(format_of(local))
    if reader is None:
        raise DataError(
            f"{path}: unknown file type {local.suffix!r}; allowed: {', '.join(SUFFIXES)} (text also as {GZIP}), "
            "a folder or a hub name"
        )
    if not local.is_file() or local.stat().st_size == 0:
        raise DataError(f"{local}: the file is empty" if local.is_file() else f"{local}: not a file")
    with os_errors_as(DataError, local, "cannot be read"):
        local.open("rb").close()
    return reader(local, start)


def can_start_anywhere(path: str, split: str) -> bool:
    """Whether ``read_rows`` gets to any row at once, where ``Start`` has its byte, or reads what is before it."""
    file = rows_file(path, split)
    return file is None or format_of(file) == ".parquet" or is_json_lines(file)


def is_json_lines(path: Path) -> bool:
    """Whether a file has one JSON value on each line."""
    if format_of(path) not in (".jsonl", ".json") or path.suffix.lower() == GZIP or _encoding(path) == "utf-16":
        return False
    with path.open("rb") as file:
        return not _is_list(_first_line(file))


def rows_file(path: str, split: str) -> Path | None:
    """The local file that ``read_rows`` reads itself; None where ``datasets`` reads a folder or a hub data set."""
    local = Path(path)
    if not local.is_dir():
        return local if local.exists() else None
    # A file named after the split is read here, so that messages name its lines; ``datasets`` reads other folders.
    names = [f"{split}{suffix}{more}" for suffix in SUFFIXES for more in ("", GZIP)]
    return next((file for name in names if (file := local / name).is_file()), None)


def format_of(path: Path) -> str:
    """The suffix that tells the format of a file: ".jsonl" for rows.jsonl and rows.jsonl.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [GZIP] and suffixes[-2:-1] != [".parquet"]:
        suffixes = suffixes[:-1]
    return suffixes[-1] if suffixes else ""


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix.lower() == GZIP else path.open("rb")


def _encoding(path: Path) -> str:
    """UTF-16 where the file begins with its byte-order mark (what Excel calls Unicode text), else UTF-8."""
    with _gzip_errors(path), _open(path) as file:
        start = file.read(2)
    return "utf-16" if start in (BOM_UTF16_LE, BOM_UTF16_BE) else "utf-8-sig"


@contextmanager
def _gzip_errors(path: Path) -> Iterator[None]:
    """A broken compressed file as one line."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: not a readable gzip file: {_one_line(error)}") from None


def _is_list(first: bytes) -> bool:
    return first.removeprefix(BOM_UTF8).lstrip().startswith(b"[")


def _first_line(file: IO[bytes]) -> bytes:
    first = file.readline()
    while first and not first.strip(b" \t\r\n" + BOM_UTF8):
        first = file.readline()
    return first


def _json_rows(path: Path, start: Start) -> Rows:
    """Rows of JSON: a list of objects, or one object a line, whatever the suffix says."""
    with _gzip_errors(path), _open(path) as file:
        if start.byte:
            file.seek(start.byte)
            yield from _json_lines(path, file, start.row)
            return
        if _encoding(path) == "utf-16":
            file = io.BytesIO(_decode(path, file.read(), "utf-16").encode("utf-8", "surrogatepass"))
        first = _first_line(file)
        file.seek(0)
        if _is_list(first):
            yield from islice(_json_list(path, _decode(path, file.read(), "utf-8-sig")), start.row, None)
            return
        _refuse_one_object(path, file, first)
        yield from islice(_json_lines(path, file), start.row, None)


def _decode(path: Path, data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        kind = "UTF-16" if encoding == "utf-16" else "UTF-8"
        raise DataError(f"{path}:{line}: invalid {kind}; the rows of this file cannot be skipped one by one") from None


def _refuse_one_object(path: Path, file: IO[bytes], first: bytes) -> None:
    """A file that holds one object over several lines is valid JSON, but not rows."""
    if not isinstance(_parse(first.decode("utf-8", "replace")), BadRow):
        return
    try:
        value = json.loads(file.read().decode("utf-8-sig"))
    except (ValueError, RecursionError):
        value = None
    file.seek(0)
    if isinstance(value, dict):
        lists = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
        hint = f"; save the list under its key {lists[0]!r} as a file" if lists else ""
        raise DataError(f"{path}: a JSON object; rows must be a JSON list, or one object a line{hint}")


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return BadRow(f"not valid JSON: {_json_problem(error)} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return BadRow(f"not valid JSON: {error}")


def _json_problem(error: json.JSONDecodeError) -> str:
    return error.msg.removesuffix(" at")  # Python says "Unterminated string starting at"


def _json_lines(path: Path, file: IO[bytes], lines_before: int = 0) -> Rows:
    for number, line in enumerate(file, start=lines_before + 1):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            yield where, BadRow(f"invalid UTF-8 at byte {error.start + 1} of the line")
            continue
        yield where, _parse(text) if text.strip() else BadRow("the line is empty")


def _json_list(path: Path, text: str) -> Rows:
    """A list of rows with the line where each starts."""
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
            reason = _json_problem(error) if isinstance(error, json.JSONDecodeError) else str(error)
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


def _csv_rows(path: Path, start: Start) -> Rows:
    """Rows of CSV or TSV; blanks around the names in the header do not count."""
    csv.field_size_limit(_MAX_CSV_FIELD_CHARS)
    encoding, separator = _encoding(path), "\t" if format_of(path) == ".tsv" else ","
    # surrogateescape keeps a broken byte in its own row, where the check of the text reports it.
    errors = "strict" if encoding == "utf-16" else "surrogateescape"
    with _gzip_errors(path), io.TextIOWrapper(_open(path), encoding, errors, newline="") as file:
        try:
            header = file.readline()
            file.seek(0)
            if encoding == "utf-16" and "\t" in header and separator not in header:
                separator = "\t"  # Excel's Unicode text is separated by tabs, whatever its suffix
            reader = csv.reader(file, delimiter=separator, strict=True)
            yield from islice(_csv_records(path, reader, separator), start.row, None)
        except UnicodeDecodeError:
            raise DataError(f"{path}: invalid UTF-16; save it as UTF-8") from None


def _csv_records(path: Path, reader: Any, separator: str) -> Rows:
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
            header = [name.strip() for name in values]
            _check_header(header, separator, where)
        elif not values:
            yield where, BadRow("the line is empty")
        elif len(values) != len(header):
            yield where, BadRow(f"{len(values)} fields where the header has {len(header)}")
        else:
            yield where, dict(zip(header, values, strict=True))


def _check_header(header: list[str], separator: str, where: str) -> None:
    if len(header) == 1:
        for other, name in _SEPARATORS.items():
            if other != separator and other in header[0]:
                raise DataError(
                    f"{where}: the header is one column, {header[0]!r}: the file seems to be separated by {name}s; "
                    f"save it with {'commas' if separator == ',' else 'tabs'}"
                )
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(f"{where}: the header names the column {repeated[0]!r} more than once")


def _text_rows(path: Path, start: Start) -> Rows:
    """Each line is an instruction; blank lines do not count."""
    with _gzip_errors(path), _open(path) as file:
        lines = _decode(path, file.read(), _encoding(path)).split("\n")
    given = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    for number, line in islice(given, start.row, None):
        yield f"{path}:{number}", {"instruction": line.rstrip("\r")}


def _parquet_rows(path: Path, start: Start) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        ends = list(accumulate(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)))
        first = bisect_right(ends, start.row)  # what is before it is not read
        number = ends[first - 1] if first else 0
        for batch in file.iter_batches(row_groups=range(first, len(ends))):
            before = min(max(start.row - number, 0), len(batch))
            number += before
            for row in batch.slice(before).to_pylist():
                number += 1
                yield f"{path}:row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {_one_line(error)}") from None


def _dataset_rows(path: str, split: str, config_name: str | None, start: int) -> Rows:
    table = open_dataset(path, split, config_name)
    if start:
        table = table.select(range(start, len(table))) if start < len(table) else []
    for number, row in enumerate(table, start=start + 1):
        yield f"{path}[{split}]:row {number}", row


def open_dataset(path: str, split: str, config_name: str | None) -> Any:
    """A split through ``datasets``: of a folder written by ``save_to_disk``, a folder of data files, or a hub name.

    Raises:
        DataError: It cannot be read.
    """
    import datasets

    is_folder = Path(path).is_dir()
    is_offline = not is_folder and offline_if_unreachable()
    try:
        if is_folder and ((Path(path) / "state.json").exists() or (Path(path) / "dataset_dict.json").exists()):
            loaded = datasets.load_from_disk(path)
            if isinstance(loaded, datasets.DatasetDict) and split not in loaded:
                raise LookupError(f"it has the splits {', '.join(map(str, loaded))}")
            return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        name, revision = split_revision(path)
        return datasets.load_dataset(name, name=config_name, split=split, revision=revision)
    # datasets raises errors of a dozen libraries (network, parsing, permissions); all mean that nothing can be read.
    except Exception as error:
        hub = "the hub cannot be reached" if is_offline else f"the hub did not provide it: {_one_line(error)}"
        what = f"the folder cannot be read: {_one_line(error)}" if is_folder else f"no such file or folder, and {hub}"
        near = "" if is_folder else did_you_mean_path(path)
        message = f"{path} (split {split!r}): {what}{near}"
        raise DataError(message, setting="data.hub_split, data.hub_config") from None


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
