"""A progress bar on a terminal, plain lines elsewhere, nothing on ranks other than 0."""

import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

PLAIN_INTERVAL_S = 5.0
BYTES_DELAY_S = 2.0


class _Lines:
    """Turns a bar's redraws into lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        line = text.strip()
        if line:
            self._stream.write(line + "\n")

    def flush(self) -> None:
        self._stream.flush()


def _columns(stream: TextIO) -> int:
    """Width of a terminal; 0 for some pseudo-terminals of scripts, on which a bar would be invisible."""
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 80


def progress_bar(
    iterable: Iterable[Any] | None = None,
    *,
    description: str,
    total: int | None = None,
    initial: int = 0,
    unit: str = "it",
    rank: int = 0,
    stream: TextIO | None = None,
) -> "tqdm[Any]":
    """A bar to iterate over, or to move with ``update(n)`` and ``set_postfix(loss=...)``; also a context manager.

    Where the stream is not a terminal, a line is printed at most every ``PLAIN_INTERVAL_S`` seconds, and one at the
    end.

    Args:
        iterable: What to iterate over.
        description: What the bar begins with.
        total: Number of items; default: the length of ``iterable``.
        initial: Number of items that an earlier run has done.
        unit: What an item is called; "B" for bytes: they are shown as kB, MB, GB, with their rate, and not at all where
            all is done within ``BYTES_DELAY_S`` seconds.
        rank: Ranks other than 0 show nothing.
        stream: Default: standard error.
    """
    stream = sys.stderr if stream is None else stream
    common: dict[str, Any] = {"desc": description, "total": total, "unit": unit, "disable": rank != 0}
    common["initial"] = initial
    if unit == "B":
        common |= {"unit_scale": True, "delay": BYTES_DELAY_S}
    if stream.isatty() and _columns(stream) > 0:
        return tqdm(iterable, file=stream, dynamic_ncols=True, **common)
    layout = (
        "{desc}: {n_fmt}/{total_fmt} {unit} ({percentage:.0f} %), {elapsed} elapsed, {remaining} remaining{postfix}"
    )
    if unit == "B":
        layout = layout.replace("{total_fmt} {unit}", "{total_fmt}{unit}").replace(" elapsed", " elapsed, {rate_fmt}")
    if total is None and not hasattr(iterable, "__len__"):
        layout = "{desc}: {n_fmt} {unit}, {elapsed} elapsed{postfix}"
    lines: Any = _Lines(stream)
    return tqdm(iterable, file=lines, mininterval=PLAIN_INTERVAL_S, miniters=1, bar_format=layout, **common)
