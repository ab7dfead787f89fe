"""How far teacher and student are from each other at each token, for losses that choose among tokens (AdaKD).

Suffixes: T tokens of the call, C tokens of one chunk, Vs this rank's classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megadistill.config.loss import Backend
from megadistill.losses.backends import make_kernels
from megadistill.losses.dense_teacher import DenseTeacher
from megadistill.losses.divergences import exp
from megadistill.losses.fused import bias_shifts, check_shard, chunk_size, chunks
from megadistill.losses.head import Head, LogitsProjector, loss_dtype
from megadistill.losses.tiles import DivergenceSum, TileSpec
from megadistill.parallel.vocab import VocabShard


@torch.no_grad()
def token_difficulty(
    student: Head,
    teacher: Head,
    shard: VocabShard,
    *,
    temperature: float = 1.0,
    chunk_tokens: int | Literal["auto"] = "auto",
    backend: Backend = "auto",
) -> Tensor:
    """Hellinger distance ||sqrt(p) - sqrt(q)|| / sqrt(2) of every token, without gradient (AdaKD, arXiv 2510.11615).

    Communicates over ``shard.group``: 6 and 3 floats per token in two all-gathers per chunk, one all-reduce of two
    numbers with a bias, and one with chunk_tokens="auto".

    Args:
        student: Hidden states [T, H] and head shard.
        teacher: The same of the teacher.
        shard: This rank's slice of the vocabulary.
        temperature: Of both distributions.
        chunk_tokens: As ``loss.chunk_tokens``.
        backend: As ``loss.backend``.

    Returns:
        [T] distances from 0 to 1 in float32 or float64, the same on every rank of ``shard.group``; NaN where a hidden
        state is not finite.

    Raises:
        ValueError: Shapes do not fit.
    """
    check_shard(shard)
    num_tokens = len(student.hidden)
    student.check("student", num_tokens, shard.size)
    teacher.check("teacher", num_tokens, shard.size)
    dtype, device = loss_dtype(student, teacher), student.hidden.device
    spec = TileSpec(formula=_squared_hellinger, temperature=temperature)
    distances = torch.zeros(num_tokens, dtype=dtype, device=device)
    with torch.autocast(device.type, enabled=False):
        size = chunk_size(chunk_tokens, shard, device)
        shifts = bias_shifts([student, teacher], shard.group)
        heads = [
            LogitsProjector(*pair) for pair in ((student, None, dtype, shifts[0]), (teacher, None, dtype, shifts[1]))
        ]
        buffer, labels = (
            heads[0].new_buffer(min(size, num_tokens)),
            torch.zeros(num_tokens, dtype=torch.int64, device=device),
        )
        tiles = DenseTeacher(heads[1], spec, make_kernels(backend, shard, device), shard, 0, min(size, num_tokens))
        for chunk, _ in chunks(num_tokens, size):
            student_CVs = heads[0].logits(chunk, buffer)
            stats = tiles.statistics(chunk, student_CVs, labels[chunk])
            sums, _ = tiles.sums(student_CVs, stats.norms, None, None)
            distances[chunk] = sums[..., DivergenceSum.VALUE].sum(0).clamp(0, 1).sqrt()
    return distances


def _squared_hellinger(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, share: float) -> tuple[Tensor, Tensor]:
    # A difference of roots: 1 - sum sqrt(p q) would lose the digits of models that nearly agree. No slope is read.
    gap = exp(0.5 * log_p) - exp(0.5 * log_q)
    value = 0.5 * gap * gap
    return value, value
