"""Collectives over a group that is passed in; with ``group=None`` each one is the identity and nothing communicates."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


def all_reduce_sum(tensor: Tensor, group: Group) -> Tensor:
    """Sum over the group, as the returned tensor; the storage of ``tensor`` may be reused. One all-reduce."""
    return _all_reduce(tensor, dist.ReduceOp.SUM, group)


def all_reduce_max(tensor: Tensor, group: Group) -> Tensor:
    """Maximum over the group, as the returned tensor; the storage of ``tensor`` may be reused. One all-reduce."""
    return _all_reduce(tensor, dist.ReduceOp.MAX, group)


def all_gather_rows(tensor: Tensor, group: Group) -> Tensor:
    """The tensors of all ranks, of equal shape, as [group size, *shape] in rank order. One all-gather."""
    if group is None:
        return tensor.unsqueeze(0)
    tensor = tensor.contiguous()
    rows = tensor.new_empty((dist.get_world_size(group), *tensor.shape))
    # The list form: the tensor form changes its name between torch releases.
    dist.all_gather(list(rows.unbind(0)), tensor, group=group)
    return rows


def differentiable_sum(tensor: Tensor, group: Group) -> Tensor:
    """Sum over the group, of whose result each rank computes with something else.

    One all-reduce, and one of the gradients in the backward pass.
    """
    return tensor if group is None else _Sum.apply(tensor, group)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_reduce_sum(tensor.clone(), group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(gradient.clone(), ctx.group), None


def _all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType, group: Group) -> Tensor:
    if group is None:
        return tensor
    tensor = tensor.contiguous()  # the backends refuse strided tensors
    dist.all_reduce(tensor, op=op, group=group)
    return tensor
