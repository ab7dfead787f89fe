"""What prepared rows are made from: the files of a source, a checksum of their content, and where their lines begin.

A file is read once for its checksum, which is kept beside the prepared rows. As long as its size, its times and its
inode number are the same, no process reads it again; the time of the last change cannot be set by hand.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from megadistill.config.data import DataSection
from megadistill.data.hub import check_name
from megadistill.data.readers import can_start_anywhere, is_json_lines, open_dataset, rows_file
from megadistill.errors import ConfigError, DataError
from megadistill.files import checksum, content_digest, new_digest, os_errors_as, write_json

RECORDS = "sources"
PART_ROWS, _PARTS_OF_A_SIZE = 1 << 14, 128
_BLOCK_BYTES = 1 << 22
# A change within this time of another may leave the same times behind.
_SETTLED_S = 2.0


def part_rows(number: int) -> range:
    """The rows of a part. Parts of large sources are larger, so that no set has too many files to map."""
    doublings, place = divmod(number, _PARTS_OF_A_SIZE)
    size = PART_ROWS << doublings
    first = PART_ROWS * _PARTS_OF_A_SIZE * ((1 << doublings) - 1) + place * size
    return range(first, first + size)


@dataclass(frozen=True)
class Content:
    """What a source holds.

    Attributes:
        digest: Checksum of the content.
        num_rows: Number of rows, where it is known before they are read.
        starts: The byte where each part begins, where a row is a line.
    """

    digest: str
    num_rows: int | None = None
    starts: tuple[int, ...] = ()


class RowSource:
    """A file, a folder or a hub data set.

    Args:
        path: Its name.
        data: How it is read.

    Attributes:
        path: Its name.
        prefix: What the place of each of its rows begins with.
        seeks: Whether reading can begin at any row.

    Raises:
        DataError: It cannot be read.
    """

    def __init__(self, path: str, data: DataSection) -> None:
        self.path, file = path, rows_file(path, data.hub_split)
        self._kind: list[Any]
        if file is not None:
            self._files, self.prefix = {"": file}, str(file)
            self._kind = ["".join(file.suffixes).lower()]
        else:
            self._files = _files_of(path, data)
            self.prefix = f"{path}[{data.hub_split}]"
            self._kind = ["datasets", data.hub_split, data.hub_config, version("datasets")]
        self._is_lines = False
        with os_errors_as(DataError, self.prefix, "cannot be read"):
            self.seeks = can_start_anywhere(path, data.hub_split)
            self._is_lines = file is not None and is_json_lines(file)

    def content(self, records: Path) -> Content:
        """What it holds now.

        Args:
            records: Folder of what is known about sources.

        Raises:
            DataError: It cannot be read, or it changes meanwhile.
        """
        known = {name: self._of_file(file, records) for name, file in self._files.items()}
        digest = checksum([self._kind, {name: each.digest for name, each in known.items()}])
        if self._is_lines:
            only = known[""]
            return Content(digest, only.num_rows, only.starts)
        return Content(digest)

    def signature(self) -> list[list[int]]:
        """Changes when one of the files does.

        Raises:
            DataError: One of them cannot be read.
        """
        with os_errors_as(DataError, self.prefix, "cannot be read"):
            return [_signature(os.stat(file)) for file in self._files.values()]

    def _of_file(self, file: Path, records: Path) -> Content:
        record = records / f"{checksum([str(file.resolve()), self._is_lines, PART_ROWS])}.json"
        with os_errors_as(DataError, file, "cannot be read"), file.open("rb") as opened:
            now, signature = time.time(), _signature(os.fstat(opened.fileno()))
            with suppress(OSError, ValueError, KeyError, TypeError):
                known = json.loads(record.read_text(encoding="utf-8"))
                if known["signature"] == signature:
                    return Content(known["digest"], known["num_rows"], tuple(known["starts"]))
            content = _read_lines(opened) if self._is_lines else Content(content_digest(opened))
            if _signature(os.fstat(opened.fileno())) != signature or _signature(os.stat(file)) != signature:
                raise DataError(f"{file} was changed while it was read; rerun the same command")
        if max(signature[1:3]) / 1e9 < now - _SETTLED_S:
            # Processes that start together write the same: one may move what another is about to move.
            with os_errors_as(DataError, records), suppress(FileNotFoundError):
                write_json(record, {"file": str(file), "signature": signature, **vars(content)})
        return content


def _signature(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _files_of(path: str, data: DataSection) -> dict[str, Path]:
    """The files that the content of a folder or a hub data set depends on, by their names in it."""
    folder = Path(path)
    if folder.is_dir():
        return {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    check_name(path, error=DataError)
    table = open_dataset(path, data.hub_split, data.hub_config)
    files = [Path(entry["filename"]) for entry in table.cache_files]
    if not files:
        raise ConfigError(
            f"{path}: `datasets` keeps this data set in memory, and rows are prepared from files alone; without a "
            "cache folder it is read",
            setting="data.cache_dir",
        )
    return {f"{at} {file.name}": file for at, file in enumerate(files)}


def _read_lines(file: Any) -> Content:
    total, starts = new_digest(), [0]
    lines = size = 0
    last = b"\n"
    for block in _blocks(file):
        total.update(block)
        found = block.count(b"\n")
        while lines + found >= (wanted := part_rows(len(starts)).start):
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
            starts.append(size + int(ends[wanted - lines - 1]) + 1)
        lines, size, last = lines + found, size + len(block), block[-1:]
    return Content(total.hexdigest(), lines + (last != b"\n"), tuple(starts))


def _blocks(file: Any) -> Iterator[bytes]:
    while block := file.read(_BLOCK_BYTES):
        yield block
