"""The objective's backends as test parameters: what cannot run here is skipped with its reason."""

import pytest

from megadistill.losses.backends import has_compiler, has_triton

BACKENDS = [
    "torch",
    pytest.param("compile", marks=pytest.mark.skipif(not has_compiler(), reason="torch.compile: no C++ compiler here")),
    pytest.param("triton", marks=pytest.mark.skipif(not has_triton(), reason="the package triton is not installed")),
]
