"""How the losses of a planned run go over their tokens: by which kernels, and how many at a time."""

from __future__ import annotations

from megadistill.losses.fused import auto_chunk_size
from megadistill.planning.case import Case


def uses_triton(case: Case) -> bool:
    """Whether the losses make no temporaries as large as a tile of logits: by Triton's kernels, on CPUs in blocks."""
    return not case.like_gpu or case.config.loss.backend in ("auto", "triton")


def chunk_tokens(case: Case) -> int:
    """Tokens whose logits are held at once."""
    given = case.config.loss.chunk_tokens
    return auto_chunk_tokens(case) if given == "auto" else int(given)


def auto_chunk_tokens(case: Case) -> int:
    """The same with ``loss.chunk_tokens: auto``."""
    return auto_chunk_size(case.student.classes, is_cpu=not case.like_gpu, memory=case.gpu_memory)
