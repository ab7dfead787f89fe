"""Files: atomic writes, JSON that every reader accepts, and one wording for what goes wrong with a file."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, BinaryIO

_PIECE = 1 << 20


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file that is on the disk when this returns: a reader sees the old file or the whole new one.

    Args:
        path: The file. Its folder must exist.
        content: Text is written as UTF-8.

    Raises:
        OSError: It cannot be written. The old file is as it was, and nothing else is left behind.
    """
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise
    sync_folder(target.parent)


def new_digest() -> hashlib.blake2b:
    """The checksum that manifests hold of files."""
    return hashlib.blake2b(digest_size=16)


def content_digest(file: BinaryIO) -> str:
    """``new_digest`` of what is left of an open file, in hexadecimal."""
    total = new_digest()
    while block := file.read(1 << 22):
        total.update(block)
    return total.hexdigest()


def write_digested(path: str | os.PathLike[str], blocks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Writes a file that is on the disk when this returns, and takes its checksum on the way: nothing is read back.

    Args:
        path: The file; an existing one is written over.
        blocks: Its content, in pieces of any size.

    Returns:
        Its entry in a manifest: ``bytes`` and ``blake2b`` of what was to be written.
    """
    total, size = new_digest(), 0
    with Path(path).open("wb", buffering=0) as file:
        for block in blocks:
            rest = memoryview(block)
            while rest:  # a piece at a time, while it is in the processor's cache
                piece, rest = rest[:_PIECE], rest[_PIECE:]
                total.update(piece)
                size += len(piece)
                while piece:
                    piece = piece[file.write(piece) :]
        os.fsync(file.fileno())
    return {"bytes": size, "blake2b": total.hexdigest()}


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk, where its file system can promise that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # a file system that cannot do this for folders
    finally:
        os.close(descriptor)


def to_jsonable(value: Any) -> Any:
    """Dataclasses, mappings, tuples, tensors and numpy scalars as plain JSON values; NaN and infinities as null.

    JSON has no NaN, and readers other than Python's refuse a file with one.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return to_jsonable(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_jsonable(item) for item in value]
    if hasattr(value, "item"):  # tensors and numpy scalars
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes ``to_jsonable(value)`` atomically, with the folders above it where they are missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(to_jsonable(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, text + "\n")


def read_json_lines(path: str | os.PathLike[str]) -> list[Any]:
    """The values of a file of ours with one JSON value on each line, such as metrics.jsonl."""
    with Path(path).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def checksum(items: Sequence[Any]) -> str:
    """A checksum of anything that JSON can hold."""
    total = hashlib.blake2b(digest_size=8)
    for item in items:
        total.update(json.dumps(item, sort_keys=True, default=str).encode())
    return total.hexdigest()


def reason_of(error: OSError) -> str:
    """Why a file could not be used, without its name: "No space left on device"."""
    return error.strerror or str(error) or type(error).__name__


@contextmanager
def os_errors_as(
    kind: Callable[[str], Exception], what: str | Path, problem: str = "cannot be written"
) -> Iterator[None]:
    """Turns an OSError of the block into one line: "WHAT PROBLEM: REASON".

    Args:
        kind: The error to raise, such as DataError.
        what: The file or folder, for the message.
        problem: What could not be done with it.
    """
    try:
        yield
    except OSError as error:
        raise kind(f"{what} {problem}: {reason_of(error)}") from None


def nearest(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The candidate spelled most like ``name``; None where none is at least ``cutoff`` (0 to 1) like it."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=cutoff)
    return close[0] if close else None


def did_you_mean(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of a message about an unknown name: "; did you mean X?", or nothing where no candidate is near."""
    close = nearest(name, candidates, cutoff)
    return "" if close is None else f"; did you mean {close}?"


def did_you_mean_path(path: str | os.PathLike[str], is_candidate: Callable[[Path], bool] = lambda _: True) -> str:
    """``did_you_mean`` for a path that does not exist; or that its folder does not exist either.

    Args:
        path: The path.
        is_candidate: Which entries of the path's folder may be proposed; default: all.
    """
    path = Path(path)
    try:
        names = [entry.name for entry in path.parent.iterdir() if is_candidate(entry)]
    except FileNotFoundError:
        return f", and no folder {path.parent}"
    except OSError:
        return ""
    close = nearest(path.name, sorted(names), cutoff=0.5)
    return "" if close is None else f"; did you mean {path.parent / close}?"
