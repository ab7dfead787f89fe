"""Collectives: values, strided views, and the identity without a group."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megadistill.parallel.collectives import all_gather_rows, all_reduce_max, all_reduce_sum
from tests.support.spawn import run_ranks


def test_without_a_group_nothing_happens() -> None:
    tensor = torch.randn(3, 4)
    assert all_reduce_sum(tensor, None) is tensor and all_reduce_max(tensor, None) is tensor
    assert torch.equal(all_gather_rows(tensor, None), tensor[None])


def test_values() -> None:
    def body(rank: int) -> None:
        group = dist.group.WORLD
        tensor = torch.arange(6.0).view(2, 3) * (rank + 1)
        expected = torch.arange(6.0).view(2, 3)
        assert torch.equal(all_reduce_sum(tensor.clone(), group), 6 * expected)
        assert torch.equal(all_reduce_max(tensor.clone(), group), 3 * expected)
        assert torch.equal(all_gather_rows(tensor, group), torch.stack([expected * (r + 1) for r in range(3)]))
        # Strided views are read as what they show.
        assert torch.equal(all_reduce_sum(tensor.clone().T, group), 6 * expected.T)
        assert torch.equal(all_gather_rows(tensor.T, group)[2], 3 * expected.T)

    run_ranks(body, 3)
