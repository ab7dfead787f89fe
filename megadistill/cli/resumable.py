"""A file of rows that is written block by block; after an interruption, the same command resumes it.

Rows go to ``OUTPUT.partial``, which becomes OUTPUT after the last one: OUTPUT is always complete. Meanwhile
``OUTPUT.progress.json`` records the settings of the rows, so that no file mixes rows of different settings.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from megadistill.cli.parsing import refuse_unwritable
from megadistill.errors import ConfigError, DataError
from megadistill.files import checksum, os_errors_as, write_atomically
from megadistill.models.fingerprint import model_fingerprint
from megadistill.observability.lock import try_lock

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1


class RowWriter(Protocol):
    """Where rank 0 writes rows."""

    def open(self, settings: Mapping[str, Any]) -> int:
        """Opens the destination.

        Args:
            settings: What determines the rows, by the names that users know.

        Returns:
            Number of rows that exist already.
        """
        ...

    def write(self, lines: Sequence[str]) -> None:
        """Appends rows."""
        ...

    def finish(self) -> None:
        """Called after the last row."""
        ...

    def close(self) -> None:
        """Called at the end, also after an error."""
        ...


class StandardOutput:
    """Rows to a stream, where nothing can be resumed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def open(self, settings: Mapping[str, Any]) -> int:
        """Always 0: a stream has no rows yet."""
        return 0

    def write(self, lines: Sequence[str]) -> None:
        """Writes rows.

        Raises:
            DataError: The stream was closed.
        """
        try:
            self._stream.write("".join(line + "\n" for line in lines))
            self._stream.flush()
        except BrokenPipeError:
            # The interpreter flushes again when it ends, and would complain again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            raise DataError("standard output was closed before the last row") from None

    def finish(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


class ResumableFile:
    """Rows to a file.

    Existing files stay as they are until the first new row is written: a run that ends earlier has changed nothing.

    Args:
        output: The file.
        ids: Ids of all rows, in the order in which they will be written.
        overwrite: Start over, and replace the file.
    """

    def __init__(self, output: Path, ids: Sequence[int], *, overwrite: bool) -> None:
        self._output, self._ids, self._overwrite = output, ids, overwrite
        self._partial = output.with_name(output.name + ".partial")
        self._progress = output.with_name(output.name + ".progress.json")
        self._file: FileIO | None = None
        self._settings: dict[str, Any] = {}
        self._kept = (0, 0)
        self._has_begun = False

    def open(self, settings: Mapping[str, Any]) -> int:
        """Opens and locks ``OUTPUT.partial``.

        Args:
            settings: What determines the rows, by the names that users know.

        Returns:
            Number of rows that an interrupted run with these settings has written.

        Raises:
            ConfigError: OUTPUT exists, the rows have other settings, or another process writes the file.
        """
        self._settings = dict(settings)
        if self._output.exists():
            if not self._output.is_file():
                raise ConfigError(f"--output {self._output} is not a regular file; omit --output for standard output")
            if not self._overwrite:
                raise ConfigError(f"--output {self._output} exists already; --overwrite replaces it")
        refuse_unwritable(self._partial, is_file=True)
        with os_errors_as(DataError, self._partial):
            self._output.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._partial.open("ab", buffering=0)
            self._lock()
            if not self._overwrite and self._has_lines():
                self._check_settings()
                self._kept = self._rows_that_are_there()
        count = self._kept[0]
        if count:
            print(f"{self._partial} has {count} of {len(self._ids)} rows; resuming after them", file=sys.stderr)
        return count

    def write(self, lines: Sequence[str]) -> None:
        """Appends rows; they are on the disk when this returns."""
        with os_errors_as(DataError, self._partial):
            self._begin()
            assert self._file is not None
            rest = memoryview("".join(line + "\n" for line in lines).encode())
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Renames the file to OUTPUT."""
        with os_errors_as(DataError, self._output):
            self._begin()
            self._partial.replace(self._output)
            self._progress.unlink(missing_ok=True)
        print(f"{len(self._ids)} responses written to {self._output}", file=sys.stderr)

    def close(self) -> None:
        """Closes the file, and removes it where it is new and empty."""
        if self._file is None:
            return
        if not self._has_begun and os.fstat(self._file.fileno()).st_size == 0:
            self._partial.unlink(missing_ok=True)
        self._file.close()
        self._file = None

    def _lock(self) -> None:
        """Refuses a second process, which would write every row twice."""
        assert self._file is not None
        if not try_lock(self._file):
            self._file.close()
            self._file = None
            raise ConfigError(f"another process is writing {self._partial}; wait for it, or choose another file")

    def _has_lines(self) -> bool:
        """Whether there is a whole line; less than one can be overwritten."""
        with self._partial.open("rb") as file:
            return file.readline().endswith(b"\n")

    def _rows_that_are_there(self) -> tuple[int, int]:
        """Numbers of rows and bytes before the first line that is not the expected row.

        After a power failure the last lines may be incomplete.
        """
        count = size = 0
        with self._partial.open("rb") as file:
            for line, expected in zip(file, self._ids, strict=False):
                if not line.endswith(b"\n") or _row_id(line) != expected:
                    break
                count, size = count + 1, size + len(line)
        return count, size

    def _check_settings(self) -> None:
        advice = "--overwrite starts over"
        try:
            record = json.loads(self._progress.read_text(encoding="utf-8"))
            before = dict(record["settings"]) if record["version"] == VERSION else None
        except (OSError, ValueError, KeyError, TypeError):
            before = None
        if before is None:
            raise ConfigError(
                f"{self._partial} has rows, but {self._progress.name} does not have their settings; {advice}"
            )
        now = self._settings
        changed = [key for key in {**now, **before} if before.get(key) != now.get(key)]
        if changed:
            key = changed[0]
            more = f"; also changed: {', '.join(changed[1:])}" if changed[1:] else ""
            raise ConfigError(
                f"{self._partial} has rows with other settings: {key} was {before.get(key, 'absent')} and is now "
                f"{now.get(key, 'absent')}{more}; resume with the settings of that run, or {advice}"
            )

    def _begin(self) -> None:
        if self._has_begun:
            return
        assert self._file is not None
        self._file.truncate(self._kept[1])
        # In this order: at no moment do old rows stand beside new settings.
        write_atomically(self._progress, json.dumps({"version": VERSION, "settings": self._settings}, indent=1))
        if self._overwrite:
            self._output.unlink(missing_ok=True)
        self._has_begun = True


def describe_model(path: str, commit: str | None) -> dict[str, str]:
    """What identifies a model: its path and files, or its commit on the hub."""
    local = Path(path)
    if not local.exists():
        return {"--model": path if commit is None else f"{path} at {commit}"}
    with os_errors_as(DataError, local, "cannot be read"):
        files = model_fingerprint(path)
    return {"--model": str(local.resolve()), **{f"{name} of --model": text for name, text in files.items()}}


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """A checksum of everything that a tokenizer does to text."""
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    return checksum([[type(tokenizer).__name__, tokenizer.special_tokens_map, rules]])


def _row_id(line: bytes) -> Any:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row.get("id") if isinstance(row, dict) else None
