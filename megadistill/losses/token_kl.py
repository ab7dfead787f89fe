"""What SCRG reads (paper: Eq. 3): forward KL of every token, the teacher's top class, and its view of the text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from megadistill.config.loss import Backend
from megadistill.losses.backends import make_kernels
from megadistill.losses.dense_teacher import local_statistics
from megadistill.losses.fused import bias_shifts, check_shard, chunk_size, chunks
from megadistill.losses.head import Head, LogitsProjector, loss_dtype
from megadistill.losses.statistics import local_target, local_top, merge_argmax
from megadistill.losses.tiles import DivergenceSum, LogNormalizers, TileSpec
from megadistill.losses.torch_kernels import TorchKernels
from megadistill.parallel.collectives import all_gather_rows, all_reduce_sum
from megadistill.parallel.vocab import VocabShard


@torch.no_grad()
def token_kl(
    student: Head,
    teacher: Head,
    shard: VocabShard,
    *,
    chunk_tokens: int | Literal["auto"] = "auto",
    backend: Backend = "auto",
    visit: Callable[[slice, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward KL sum_c p_c (log p_c - log q_c) and argmax p of every token, at temperature 1, without gradient.

    Communicates over ``shard.group``: 6 floats per token in one all-gather per chunk.

    Args:
        student: Hidden states [T, H] and head shard.
        teacher: The same of the teacher.
        shard: This rank's slice of the vocabulary.
        chunk_tokens: As ``loss.chunk_tokens``.
        backend: As ``loss.backend``.
        visit: Called with (slice of the chunk, the teacher's logits [C, Vs] up to a constant); it must neither change
            nor keep them. The teacher's token is drawn from them.

    Returns:
        The KL map [T] in nats, in float32 or float64, and the top class [T] int64, the lowest when tied. Where a
        hidden state is not finite the map is not finite either, and nowhere else.

    Raises:
        ValueError: Shapes do not fit.
    """
    check_shard(shard)
    if not isinstance(teacher, Head):
        raise ValueError(f"token_kl needs the teacher's hidden states and head, got {type(teacher).__name__}")
    num_tokens = len(student.hidden)
    student.check("student", num_tokens, shard.size)
    teacher.check("teacher", num_tokens, shard.size)
    dtype, device = loss_dtype(student, teacher), student.hidden.device
    spec, kernels = TileSpec(), make_kernels(backend, shard, device)
    kl_map = torch.zeros(num_tokens, dtype=dtype, device=device)
    top1 = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    with torch.autocast(device.type, enabled=False):
        size = chunk_size(chunk_tokens, shard, device)
        shifts = bias_shifts([student, teacher], shard.group)
        pairs = zip((student, teacher), shifts, strict=True)
        heads = [LogitsProjector(head, None, dtype, shift) for head, shift in pairs]
        buffers = [head.new_buffer(min(size, num_tokens)) for head in heads]
        for chunk, _ in chunks(num_tokens, size):
            student_CVs, teacher_CVs = (head.logits(chunk, buffer) for head, buffer in zip(heads, buffers, strict=True))
            columns = _local_columns(spec, kernels, student_CVs, teacher_CVs, shard)
            gathered = all_gather_rows(torch.stack(columns, -1), shard.group)
            kl_map[chunk] = _merge_kl(*gathered[..., :5].double().unbind(-1)).to(dtype)
            top1[chunk] = merge_argmax(gathered[..., 2], gathered[..., 5], shard)
            if visit is not None:
                visit(chunk, teacher_CVs)
    return kl_map, top1


@torch.no_grad()
def label_scores(logits_CVs: Tensor, labels: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor, Tensor]:
    """What a model thinks of given classes.

    Communicates over ``shard.group``: 3 floats per token in one all-gather, and one integer in one all-reduce.

    Args:
        logits_CVs: [C, Vs] its logits, up to a constant per token.
        labels: [C] int64 classes.
        shard: This rank's slice of the vocabulary.

    Returns:
        Per token [C]: the class's log-probability in nats, what the best class has more (both float64), and the
        number of classes with a larger logit (int64).
    """
    num_tokens = len(logits_CVs)
    local = [logits_CVs.new_full((num_tokens,), -torch.inf, dtype=torch.float64) for _ in range(2)]
    if shard.size:
        local = [logits_CVs.amax(-1).double(), logits_CVs.logsumexp(-1).double()]
    columns = torch.stack([*local, local_target(logits_CVs, labels, shard).double()], -1)
    largest, log_sum, target = all_gather_rows(columns, shard.group).unbind(-1)
    label = target.sum(0)
    better = (logits_CVs > label.to(logits_CVs.dtype).unsqueeze(-1)).sum(-1)
    return label - log_sum.logsumexp(0), largest.amax(0) - label, all_reduce_sum(better, shard.group)


def _local_columns(
    spec: TileSpec, kernels: TorchKernels, student_CVs: Tensor, teacher_CVs: Tensor, shard: VocabShard
) -> list[Tensor]:
    """A shard's student_max, student_log, teacher_max, teacher_log, KL within the shard, and top class, each [C]."""
    local = local_statistics(spec, kernels, student_CVs, teacher_CVs)
    assert local.teacher_max is not None and local.teacher_sum is not None
    logs = local.student_sum.log(), local.teacher_sum.log()
    local_kl = torch.zeros_like(local.student_max)
    if shard.size:
        # The KL between the distributions within a shard needs no merged normalizer: one exchange is enough.
        norms = LogNormalizers(local.student_max, logs[0], None, local.teacher_max, logs[1])
        local_kl = kernels.sums(spec, student_CVs, teacher_CVs, norms, None)[:, DivergenceSum.KL]
    classes = local_top(spec, local, teacher_CVs, shard, 0)[2].to(student_CVs.dtype)
    return [local.student_max, logs[0], local.teacher_max, logs[1], local_kl, classes]


def _merge_kl(
    student_max: Tensor, student_log: Tensor, teacher_max: Tensor, teacher_log: Tensor, local_kl: Tensor
) -> Tensor:
    """Chain rule over the shards: KL = sum_r P_r (KL_r + log P_r - log Q_r), P_r and Q_r the mass of shard r."""
    log_mass_p = _log_mass(teacher_max, teacher_log)
    log_mass_q = _log_mass(student_max, student_log)
    mass = log_mass_p.exp()
    terms = torch.where(mass > 0, mass * (local_kl + log_mass_p - log_mass_q), 0.0)
    terms = torch.where(mass.isnan(), mass, terms)
    return terms.sum(0).clamp_min(0.0)


def _log_mass(largest: Tensor, log_sum: Tensor) -> Tensor:
    """[R, C] log of each shard's share."""
    local = log_sum + (largest - largest.amax(0))
    return local - torch.logsumexp(local, 0)
