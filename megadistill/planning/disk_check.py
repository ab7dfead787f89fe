"""The disk of a run's folder: free space, speed, and whether all machines see the same files."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megadistill.files import write_digested

_BLOCK, _BLOCKS = 4 << 20, 16


@dataclass(frozen=True)
class Disk:
    """A folder's disk.

    Attributes:
        free: Bytes.
        write: Bytes a second, fsync included.
        read: Bytes a second, after the system was told to forget the file.
    """

    free: int
    write: float
    read: float


def existing_folder(run_dir: str) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    folder = Path(run_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def measure_disk(folder: Path, mark: str) -> Disk:
    """Writes 64 MiB into a folder, reads them, and removes them.

    Args:
        folder: An existing folder.
        mark: Makes the file's name unique.

    Raises:
        OSError: It cannot be written, read, or removed.
    """
    file = folder / f".doctor-{mark}.speed"
    try:
        block = os.urandom(_BLOCK)  # compressing file systems would write nothing of zeros
        started = time.perf_counter()
        write_digested(file, [block] * _BLOCKS)
        written = time.perf_counter() - started
        if hasattr(os, "posix_fadvise"):
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        with file.open("rb", buffering=0) as opened:
            while opened.read(_BLOCK):
                pass
        read = time.perf_counter() - started
    finally:
        with suppress(FileNotFoundError):
            file.unlink()
    size = _BLOCK * _BLOCKS
    return Disk(shutil.disk_usage(folder).free, size / written, size / read)


def mark_file(folder: Path, mark: str) -> Path:
    """The file by which other machines recognize the folder."""
    return folder / f".doctor-{mark}"


def sees(file: Path, mark: str, wait_s: float = 5.0) -> bool:
    """Whether this machine sees the file that another one has made; file systems may take a moment."""
    deadline = time.monotonic() + wait_s
    while True:
        with suppress(OSError):
            os.listdir(file.parent)  # makes a network file system look again
            if file.read_text(encoding="utf-8") == mark:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
