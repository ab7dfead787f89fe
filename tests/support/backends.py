"""The objective's backends as test parameters: what cannot run here is skipped with its reason."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest

from megadistill.losses.backends import has_compiler, has_triton

BACKENDS = [
    "torch",
    pytest.param("compile", marks=pytest.mark.skipif(not has_compiler(), reason="torch.compile: no C++ compiler here")),
    pytest.param("triton", marks=pytest.mark.skipif(not has_triton(), reason="the package triton is not installed")),
]


def with_backends(compiled: Iterable[tuple[Any, ...]], *axes: Iterable[Any]) -> list[Any]:
    """Parameters (backend, *values): every combination of ``axes``, for torch.compile ``compiled`` alone, where each
    is a compilation of half a minute."""
    found = []
    for backend in BACKENDS:
        name, marks = (backend, ()) if isinstance(backend, str) else (backend.values[0], backend.marks)
        rows = compiled if name == "compile" else itertools.product(*axes)
        found += [pytest.param(name, *row, marks=marks) for row in rows]
    return found
