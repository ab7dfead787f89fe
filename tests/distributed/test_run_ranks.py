"""What ``run_ranks`` says of a rank that fails or hangs."""

import pytest
import torch
import torch.distributed as dist

from tests.support.spawn import RankError, run_ranks


def test_a_failing_rank_is_named():
    def body(rank):
        if rank == 1:
            raise KeyError("the reason")

    with pytest.raises(RankError, match=r"rank 1 of 2 failed[\s\S]*the reason"):
        run_ranks(body, 2)


def test_a_hanging_rank_is_named_and_ended():
    def body(rank):
        if rank == 0:
            dist.recv(torch.zeros(1), src=1)

    with pytest.raises(RankError, match="were not done after 1.0 s|rank . of 2 failed"):
        run_ranks(body, 2, timeout_s=1.0)
