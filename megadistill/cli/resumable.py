"""An output file of rows that is written block by block, and that an interrupted run's command goes on with.

Rows go to ``OUTPUT.partial``, which becomes OUTPUT when the last one is there: whoever finds OUTPUT finds all of it.
``OUTPUT.progress.json`` says meanwhile which settings the rows come from, so that no file ever mixes two of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, TextIO

from megadistill.checkpoint.manifest import write_atomically
from megadistill.cli.parsing import refuse_unwritable
from megadistill.errors import ConfigError, DataError
from megadistill.models.fingerprint import model_fingerprint
from megadistill.observability.lock import try_lock

VERSION = 1


class RowWriter(Protocol):
    """Where rank 0 puts rows. ``close`` is called in any case, ``finish`` after the last row only."""

    def open(self, settings: Mapping[str, Any]) -> int:
        """Number of rows that are there already; ``settings`` are what decides the rows, by the names that users
        know."""
        ...

    def write(self, lines: Sequence[str]) -> None: ...

    def finish(self) -> None: ...

    def close(self) -> None: ...


class StandardOutput:
    """Rows to a stream, where nothing can be resumed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def open(self, settings: Mapping[str, Any]) -> int:
        return 0

    def write(self, lines: Sequence[str]) -> None:
        try:
            self._stream.write("".join(line + "\n" for line in lines))
            self._stream.flush()
        except BrokenPipeError:
            # The interpreter flushes once more when it ends, and would complain once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            raise DataError("standard output was closed before the last row") from None

    def finish(self) -> None: ...

    def close(self) -> None: ...


class ResumableFile:
    """Rows to a file. Nothing that is there is touched before the first new row is written: a run that ends before,
    for whatever reason, has changed nothing."""

    def __init__(self, output: Path, ids: Sequence[int], *, overwrite: bool) -> None:
        """``ids`` are those of all rows, in the order in which they will be written."""
        self._output, self._ids, self._overwrite = output, ids, overwrite
        self._partial = output.with_name(output.name + ".partial")
        self._progress = output.with_name(output.name + ".progress.json")
        self._file: FileIO | None = None
        self._settings: dict[str, Any] = {}
        self._kept = (0, 0)
        self._has_begun = False

    def open(self, settings: Mapping[str, Any]) -> int:
        """Number of rows that an interrupted run with these settings has left.

        Raises ConfigError where OUTPUT is there, where other settings wrote the rows, or where another process writes.
        """
        self._settings = dict(settings)
        if self._output.exists():
            if not self._output.is_file():
                raise ConfigError(f"--output {self._output} is no regular file; leave --output out for standard output")
            if not self._overwrite:
                raise ConfigError(f"--output {self._output} exists already; --overwrite replaces it")
        refuse_unwritable(self._partial, is_file=True)
        with _clear_errors(self._partial):
            self._output.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._partial.open("ab", buffering=0)
            self._lock()
            if not self._overwrite and self._has_lines():
                self._check_settings()
                self._kept = self._rows_that_are_there()
        count = self._kept[0]
        if count:
            print(f"{self._partial} has {count} of {len(self._ids)} rows; going on after them", file=sys.stderr)
        return count

    def write(self, lines: Sequence[str]) -> None:
        """Appends rows and returns when they are on the disk."""
        with _clear_errors(self._partial):
            self._begin()
            assert self._file is not None
            rest = memoryview("".join(line + "\n" for line in lines).encode())
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Puts the file in its place."""
        with _clear_errors(self._output):
            self._begin()
            self._partial.replace(self._output)
            self._progress.unlink(missing_ok=True)
        print(f"{len(self._ids)} responses written to {self._output}", file=sys.stderr)

    def close(self) -> None:
        if self._file is None:
            return
        if not self._has_begun and os.fstat(self._file.fileno()).st_size == 0:
            self._partial.unlink(missing_ok=True)
        self._file.close()
        self._file = None

    def _lock(self) -> None:
        """Two processes that append to one file would write every row twice."""
        assert self._file is not None
        if not try_lock(self._file):
            self._file.close()
            self._file = None
            raise ConfigError(f"another process is writing {self._partial}; wait for it or choose another file")

    def _has_lines(self) -> bool:
        """Less than one line is nothing that could be lost."""
        with self._partial.open("rb") as file:
            return file.readline().endswith(b"\n")

    def _rows_that_are_there(self) -> tuple[int, int]:
        """Rows and bytes up to the first line that is torn or not the row expected there (what a disk that lost power
        makes of the last lines)."""
        count = size = 0
        with self._partial.open("rb") as file:
            for line, expected in zip(file, self._ids, strict=False):
                if not line.endswith(b"\n") or _row_id(line) != expected:
                    break
                count, size = count + 1, size + len(line)
        return count, size

    def _check_settings(self) -> None:
        anew = "--overwrite starts anew"
        try:
            record = json.loads(self._progress.read_text(encoding="utf-8"))
            before = dict(record["settings"]) if record["version"] == VERSION else None
        except (OSError, ValueError, KeyError, TypeError):
            before = None
        if before is None:
            raise ConfigError(
                f"{self._partial} has rows, but {self._progress.name} does not say which settings wrote them; {anew}"
            )
        now = self._settings
        changed = [key for key in {**now, **before} if before.get(key) != now.get(key)]
        if changed:
            key = changed[0]
            more = f"; also changed: {', '.join(changed[1:])}" if changed[1:] else ""
            raise ConfigError(
                f"{self._partial} has rows that other settings wrote: {key} was {before.get(key, 'absent')} and is now "
                f"{now.get(key, 'absent')}{more}; the settings of that run go on with it, {anew}"
            )

    def _begin(self) -> None:
        if self._has_begun:
            return
        assert self._file is not None
        self._file.truncate(self._kept[1])
        # In this order: at no moment are there rows with the settings of others, or rows of before beside new ones.
        write_atomically(self._progress, json.dumps({"version": VERSION, "settings": self._settings}, indent=1))
        if self._overwrite:
            self._output.unlink(missing_ok=True)
        self._has_begun = True


def describe_model(path: str, commit: str | None) -> dict[str, str]:
    """What stands for a model: its place and files, or the hub's commit."""
    local = Path(path)
    if not local.exists():
        return {"--model": path if commit is None else f"{path} at {commit}"}
    with _clear_errors(local, "read"):
        files = model_fingerprint(path)
    return {"--model": str(local.resolve()), **{f"{name} of --model": text for name, text in files.items()}}


def describe_tokenizer(tokenizer: Any) -> str:
    """A checksum of all that a tokenizer does to text."""
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    return checksum([[type(tokenizer).__name__, tokenizer.special_tokens_map, rules]])


def checksum(items: Sequence[Any]) -> str:
    """Of anything that JSON can hold."""
    found = hashlib.blake2b(digest_size=8)
    for item in items:
        found.update(json.dumps(item, sort_keys=True, default=str).encode())
    return found.hexdigest()


def _row_id(line: bytes) -> Any:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row.get("id") if isinstance(row, dict) else None


@contextmanager
def _clear_errors(path: Path, what: str = "written") -> Iterator[None]:
    """A full disk or a missing permission becomes one line."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be {what}: {error.strerror or error}") from None
