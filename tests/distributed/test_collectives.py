"""Collectives and their gradients under the replicated-loss convention."""

import pytest
import torch
import torch.distributed as dist

from megadistill.parallel import VocabShard
from megadistill.parallel.collectives import (
    all_gather_rows,
    all_reduce_max,
    all_reduce_sum,
    copy_to_shards,
    gather_vocab,
    reduce_from_shards,
)
from tests.support.spawn import run_ranks


def test_without_a_group_nothing_happens():
    tensor = torch.randn(3, 4, requires_grad=True)
    assert all_reduce_sum(tensor, None) is tensor and all_reduce_max(tensor, None) is tensor
    assert all_gather_rows(tensor, None).shape == (1, 3, 4)
    for out in (
        copy_to_shards(tensor, None),
        reduce_from_shards(tensor, None),
        gather_vocab(tensor, VocabShard(0, 4, 4)),
    ):
        assert torch.equal(out, tensor)
        (gradient,) = torch.autograd.grad(out.sum(), tensor)
        assert torch.equal(gradient, torch.ones(3, 4))


def test_values():
    def body(rank):
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


@pytest.mark.parametrize("tp_size", [2, 3])
def test_gradients_of_a_sharded_layer_equal_the_dense_ones(tp_size):
    """x -> columns of W1 on each shard -> rows of W2 on each shard: no factor tp anywhere."""

    def body(rank):
        generator = torch.Generator().manual_seed(0)
        x, first, second = (
            torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4, 5), (5, 7), (7, 3))
        )
        for tensor in (x, first, second):
            tensor.requires_grad_()
        expected = torch.autograd.grad((torch.tanh(x @ first) @ second).square().sum(), (x, first, second))
        shard = VocabShard.split(7, tp_size, rank, dist.group.WORLD)
        part = slice(shard.start, shard.stop)
        hidden = torch.tanh(copy_to_shards(x, shard.group) @ first[:, part])
        out = reduce_from_shards(hidden @ second[part], shard.group)
        found = torch.autograd.grad(out.square().sum(), (x, first, second))
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(found[1][:, part], expected[1][:, part])
        torch.testing.assert_close(found[2][part], expected[2][part])

    run_ranks(body, tp_size)


def test_gathering_an_uneven_vocabulary_and_its_gradient():
    def body(rank):
        whole = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        start, stop = [(0, 4), (4, 4), (4, 7)][rank]
        part = whole[..., start:stop].clone().requires_grad_()
        gathered = gather_vocab(part, VocabShard(start, stop, 7, dist.group.WORLD))
        assert torch.equal(gathered, whole)
        (gradient,) = torch.autograd.grad(gathered.square().sum(), part)
        torch.testing.assert_close(gradient, 2 * whole[..., start:stop])

    run_ranks(body, 3)
