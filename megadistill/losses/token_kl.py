"""The KL map that SCRG reads (paper: Eq. 3): forward KL of every row and the teacher's first class, nothing else."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megadistill.losses.fused import check_shard, chunk_size, chunks
from megadistill.losses.head import Head, LogitsProjector, loss_dtype
from megadistill.losses.statistics import local_argmax, merge_argmax
from megadistill.parallel.collectives import all_gather_rows
from megadistill.parallel.vocab import VocabShard


@torch.no_grad()
def token_kl(
    student: Head, teacher: Head, shard: VocabShard, *, chunk_tokens: int | Literal["auto"] = "auto"
) -> tuple[Tensor, Tensor]:
    """(kl_map [T] in nats, teacher_top1 [T] int64): sum_c p_c (log p_c - log q_c), and argmax p (lowest class if tied).

    At temperature 1, without gradient, float32 or better; every row counts. Rows whose hidden state is not finite
    give a map that is not finite there and nowhere else. Communicates 5 floats a row in one all-gather a chunk over
    `shard.group`. Raises ValueError for shapes that do not fit.
    """
    check_shard(shard)
    num_rows = len(student.hidden)
    student.check("student", num_rows, shard.size)
    teacher.check("teacher", num_rows, shard.size)
    dtype = loss_dtype(student, teacher)
    device = student.hidden.device
    kl_map = torch.zeros(num_rows, dtype=dtype, device=device)
    top1 = torch.zeros(num_rows, dtype=torch.int64, device=device)
    with torch.autocast(device.type, enabled=False):
        heads = [LogitsProjector(head, None, dtype) for head in (student, teacher)]
        for chunk, _ in chunks(num_rows, chunk_size(chunk_tokens, shard, device)):
            student_CV, teacher_CV = (head.logits(chunk) for head in heads)
            largest, index = local_argmax(teacher_CV, shard)
            student_lse, teacher_lse = torch.logsumexp(student_CV, -1), torch.logsumexp(teacher_CV, -1)
            # Each shard's KL between the distributions within it needs no merged normaliser: one exchange is enough.
            log_q, log_p = (
                tile.sub_(_finite(lse).unsqueeze(-1))
                for tile, lse in ((student_CV, student_lse), (teacher_CV, teacher_lse))
            )
            local_kl = (log_p.exp() * (log_p - log_q)).sum(-1)
            local = torch.stack([student_lse, teacher_lse, local_kl, largest, index.to(dtype)], -1)
            gathered = all_gather_rows(local, shard.group)
            kl_map[chunk] = _merge_kl(gathered[..., 0], gathered[..., 1], gathered[..., 2])
            top1[chunk] = merge_argmax(gathered[..., 3], gathered[..., 4], shard)
    return kl_map, top1


def _merge_kl(student_lse: Tensor, teacher_lse: Tensor, local_kl: Tensor) -> Tensor:
    """Chain rule over the shards: KL = sum_r P_r (KL_r + log P_r - log Q_r), P_r and Q_r the mass of shard r."""
    log_mass_p = teacher_lse - torch.logsumexp(teacher_lse, 0)
    log_mass_q = student_lse - torch.logsumexp(student_lse, 0)
    mass = log_mass_p.exp()
    terms = torch.where(mass > 0, mass * (local_kl + log_mass_p - log_mass_q), 0.0)
    terms = torch.where(mass.isnan(), mass, terms)
    return terms.sum(0).clamp_min(0.0)


def _finite(lse: Tensor) -> Tensor:
    return torch.where(torch.isneginf(lse), 0.0, lse)
