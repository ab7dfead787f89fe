"""The tensors among an operation's arguments and results, which are tensors and lists of them: no general tree walk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def tensors_in(*values: Any) -> Iterator[Tensor]:
    """All tensors in values, and in lists and tuples among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(*value)
