"""Tokenized rows in files that processes map into memory: what a row looks like there, and rows that are read from it.

A set of rows is a folder with ``index.npy``, one fixed-size entry for each row, and ``part_N.bin``, their records. A
record is int32 numbers (prompt ids, response ids, targets, lengths of the references) and UTF-8 bytes (prompt, place,
references). Nothing is kept per row in the memory of a process: its pages are those of the file, which all processes of
a machine share.
"""

from __future__ import annotations

import hashlib
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np

from megadistill.data.encode import TokenizedExample
from megadistill.errors import DataError
from megadistill.files import os_errors_as

# Written into the key of a set: raise it when rows are read, tokenized or stored in another way.
FORMAT = 2
INDEX = "index.npy"
ENTRY = np.dtype(
    [
        ("offset", "<i8"),  # of the record in its part
        ("digest", "<u8"),  # of what is trained on: lengths, prompt ids, response ids, targets
        ("id", "<i8"),
        ("part", "<u4"),
        ("bytes", "<u4"),  # of the record
        ("crc", "<u4"),  # of the record
        ("largest", "<u4"),  # token id
        ("prompt", "<u4"),  # number of tokens
        ("response", "<i4"),  # number of tokens; -1: none
        ("targets", "<u4"),
        ("references", "<u4"),
        ("text", "<u4"),  # bytes of the prompt's text
        ("where", "<u4"),  # bytes of the place
    ]
)
_DIGEST_BYTES = 8


def part_name(number: int) -> str:
    """The file with the records of a part."""
    return f"part_{number:06d}.bin"


def _bytes_of(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def pack(row: TokenizedExample, part: int, offset: int, prefix: str) -> tuple[bytes, tuple[int, ...]]:
    """The record of a row, and its entry in the index.

    Args:
        row: The row.
        part: Number of the part that it goes to.
        offset: Bytes of that part before it.
        prefix: What ``row.where`` begins with: the file, which may have another name the next time.
    """
    response, targets = row.response_ids or (), [position for span in row.targets for position in span]
    texts = [_bytes_of(text) for text in (row.prompt, row.where.removeprefix(prefix), *row.references)]
    trained = array("i", [*row.prompt_ids, *response, *targets]).tobytes()
    record = b"".join([trained, array("i", map(len, texts[2:])).tobytes(), *texts])
    lengths = (len(row.prompt_ids), -1 if row.response_ids is None else len(response), len(row.targets))
    total = hashlib.blake2b(array("i", lengths).tobytes() + trained, digest_size=_DIGEST_BYTES)
    digest = int.from_bytes(total.digest(), "little")
    largest = max(max(row.prompt_ids, default=0), max(response, default=0))
    head = (offset, digest, row.id, part, len(record), zlib.crc32(record), largest)
    return record, (*head, *lengths, len(row.references), len(texts[0]), len(texts[1]))


def unpack(record: bytes, entry: Any, prefix: str) -> TokenizedExample:
    """The row of a record; the inverse of ``pack``."""
    prompt, response, targets = int(entry["prompt"]), int(entry["response"]), int(entry["targets"])
    references = int(entry["references"])
    given = max(response, 0)
    numbers = array("i", record[: 4 * (prompt + given + 2 * targets + references)]).tolist()
    spans = numbers[prompt + given : prompt + given + 2 * targets]
    sizes = [int(entry["text"]), int(entry["where"]), *numbers[len(numbers) - references :]]
    ends = list(accumulate(sizes, initial=4 * len(numbers)))
    texts = [record[a:b].decode("utf-8", "surrogatepass") for a, b in zip(ends, ends[1:], strict=False)]
    return TokenizedExample(
        int(entry["id"]),
        tuple(numbers[:prompt]),
        None if response < 0 else tuple(numbers[prompt : prompt + given]),
        tuple(texts[2:]),
        texts[0],
        tuple(zip(spans[::2], spans[1::2], strict=True)),
        prefix + texts[1],
    )


class MappedRows(Sequence[TokenizedExample]):
    """Rows of a prepared set, read from its files when they are asked for; equal to the list of these rows.

    Args:
        folder: The folder of the set.
        prefix: What the place of each row begins with.
        places: Which rows of the set; None: all.

    Raises:
        DataError: The files cannot be read.
    """

    def __init__(self, folder: Path, prefix: str, places: range | None = None) -> None:
        self._folder, self._prefix = folder, prefix
        with os_errors_as(DataError, folder, "cannot be read"):
            self._index = np.load(folder / INDEX, mmap_mode="r")
        self._places = range(len(self._index)) if places is None else places
        self._parts: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, at: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, at: slice) -> MappedRows: ...
    def __getitem__(self, at: int | slice) -> TokenizedExample | MappedRows:
        if isinstance(at, slice):
            return MappedRows(self._folder, self._prefix, self._places[at])
        entry = self._index[self._places[at]]
        part = int(entry["part"])
        if part not in self._parts:
            file = self._folder / part_name(part)
            with os_errors_as(DataError, file, "cannot be read"):
                self._parts[part] = np.memmap(file, np.uint8, "r")
        start = int(entry["offset"])
        record = self._parts[part][start : start + int(entry["bytes"])].tobytes()
        if zlib.crc32(record) != int(entry["crc"]):
            raise DataError(
                f"{self._folder / part_name(part)}: the row at byte {start} is damaged; remove the folder, and the "
                "rows are prepared again",
                setting="data.cache_dir",
            )
        return unpack(record, entry, self._prefix)

    @property
    def has_references(self) -> bool:
        """Whether one of the rows has a reference."""
        return bool((self._column("response") >= 0).any())

    def first_over(self, vocab_size: int) -> TokenizedExample | None:
        """The first row with a token id of ``vocab_size`` or more."""
        over = self._column("largest") >= vocab_size
        return self[int(over.argmax())] if over.any() else None

    def digests(self) -> Iterator[bytes]:
        """Checksums of what is trained on, for all rows in their order."""
        yield np.ascontiguousarray(self._column("digest")).tobytes()

    def _column(self, name: str) -> np.ndarray:
        places = self._places
        if places.step == 1:
            return self._index[name][places.start : places.stop]
        return self._index[name][np.arange(places.start, places.stop, places.step)]


class ChainedRows(Sequence[TokenizedExample]):
    """Several sequences of rows, one after the other, without a copy."""

    def __init__(self, sources: Iterable[Sequence[TokenizedExample]]) -> None:
        self.sources = tuple(sources)
        self._ends = list(accumulate(len(rows) for rows in self.sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, at: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[TokenizedExample]: ...
    def __getitem__(self, at: int | slice) -> TokenizedExample | Sequence[TokenizedExample]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        number = range(len(self))[at]
        source = int(np.searchsorted(self._ends, number, side="right"))
        return self.sources[source][number - (self._ends[source - 1] if source else 0)]


def digest_of(rows: Sequence[TokenizedExample]) -> Iterator[bytes]:
    """Checksums of what is trained on, for all rows in their order, wherever the rows are."""
    if isinstance(rows, MappedRows):
        yield from rows.digests()
    elif isinstance(rows, ChainedRows):
        for source in rows.sources:
            yield from digest_of(source)
    else:
        for row in rows:
            yield pack(row, 0, 0, "")[1][1].to_bytes(_DIGEST_BYTES, "little")


def _any_source(rows: Sequence[TokenizedExample], found: Callable[[Sequence[TokenizedExample]], bool]) -> bool:
    return any(_any_source(source, found) for source in rows.sources) if isinstance(rows, ChainedRows) else found(rows)


def has_references(rows: Sequence[TokenizedExample]) -> bool:
    """Whether one of the rows has a reference to train on."""

    def found(source: Sequence[TokenizedExample]) -> bool:
        return source.has_references if isinstance(source, MappedRows) else any(row.response_ids for row in source)

    return _any_source(rows, found)
