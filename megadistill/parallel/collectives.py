"""Collectives over a group that is passed in; with `group=None` each one is the identity and nothing communicates.

The convention for gradients (docs/method.md, "Across vocabulary shards"): every tensor-parallel rank back-propagates
the same, replicated loss. So a value that each rank uses *in part* is entered with `copy_to_shards`, and partial
results leave with `reduce_from_shards`; a differentiable all-reduce on both ends would scale gradients by tp.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megadistill.parallel.vocab import VocabShard

Group = dist.ProcessGroup | None


def all_reduce_sum(tensor: Tensor, group: Group) -> Tensor:
    """Sum over the group, as the returned tensor; the storage of `tensor` may be reused. One all-reduce."""
    return _all_reduce(tensor, dist.ReduceOp.SUM, group)


def all_reduce_max(tensor: Tensor, group: Group) -> Tensor:
    """Maximum over the group, as the returned tensor; the storage of `tensor` may be reused. One all-reduce."""
    return _all_reduce(tensor, dist.ReduceOp.MAX, group)


def all_gather_rows(tensor: Tensor, group: Group) -> Tensor:
    """The tensors of all ranks, of equal shape, as [group size, *shape] in rank order; one all-gather."""
    if group is None:
        return tensor.unsqueeze(0)
    tensor = tensor.contiguous()
    rows = tensor.new_empty((dist.get_world_size(group), *tensor.shape))
    # The list form: the tensor form changes its name between torch releases.
    dist.all_gather(list(rows.unbind(0)), tensor, group=group)
    return rows


def gather_vocab(shard_values: Tensor, shard: VocabShard) -> Tensor:
    """[..., stop-start] of every rank -> [..., total] in class order on every rank. For checks and small inputs.

    Differentiable under the replicated-loss convention: each rank's gradient is its own slice. Shards may be uneven.
    """
    return _GatherVocab.apply(shard_values, shard)  # type: ignore[no-any-return]


def copy_to_shards(tensor: Tensor, group: Group) -> Tensor:
    """Identity forward; the gradient is summed over the group, whose ranks each use `tensor` in part."""
    return _CopyToShards.apply(tensor, group)  # type: ignore[no-any-return]


def reduce_from_shards(tensor: Tensor, group: Group) -> Tensor:
    """Sum over the group forward; the gradient passes unchanged, because every rank holds the same one."""
    return _ReduceFromShards.apply(tensor, group)  # type: ignore[no-any-return]


def _all_reduce(tensor: Tensor, op: Any, group: Group) -> Tensor:
    if group is None:
        return tensor
    tensor = tensor.contiguous()  # the backends refuse strided tensors
    dist.all_reduce(tensor, op=op, group=group)
    return tensor


class _CopyToShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(grad.clone(), ctx.group), None


class _ReduceFromShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        return all_reduce_sum(tensor.clone(), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherVocab(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard_values: Tensor, shard: VocabShard) -> Tensor:
        ctx.shard = shard
        if shard.group is None:
            return shard_values.clone()
        bounds = all_gather_rows(torch.tensor([shard.start, shard.stop], device=shard_values.device), shard.group)
        widest = int((bounds[:, 1] - bounds[:, 0]).max())
        padded = torch.nn.functional.pad(shard_values, (0, widest - shard.size))
        rows = all_gather_rows(padded, shard.group)
        return torch.cat(
            [row[..., : stop - start] for row, (start, stop) in zip(rows, bounds.tolist(), strict=True)], -1
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[..., ctx.shard.start : ctx.shard.stop].contiguous(), None
