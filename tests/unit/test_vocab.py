"""Slices of the vocabulary."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadistill.errors import TopologyError
from megadistill.parallel import VocabShard


@given(total=st.integers(0, 1000), tp_size=st.integers(1, 16))
def test_a_split_covers_the_vocabulary_in_order_larger_shards_first(total, tp_size):
    shards = [VocabShard.split(total, tp_size, rank) for rank in range(tp_size)]
    assert shards[0].start == 0 and shards[-1].stop == total
    assert all(left.stop == right.start for left, right in zip(shards, shards[1:], strict=False))
    sizes = [shard.size for shard in shards]
    assert sizes == sorted(sizes, reverse=True) and max(sizes) - min(sizes) <= 1


def test_a_split_follows_deepspeed():
    # GPT-2's vocabulary is odd: rank 0 holds one class more.
    assert [VocabShard.split(50257, 2, rank).size for rank in range(2)] == [25129, 25128]


def test_without_a_group_there_is_one_rank():
    shard = VocabShard(0, 5, 5)
    assert (shard.size, shard.tp_size, shard.tp_rank) == (5, 1, 0)


@pytest.mark.parametrize(("start", "stop", "total"), [(-1, 3, 5), (3, 2, 5), (0, 6, 5)])
def test_bounds_outside_the_vocabulary_are_refused(start, stop, total):
    with pytest.raises(TopologyError, match=f"within the {total} classes"):
        VocabShard(start, stop, total)


@pytest.mark.parametrize(("tp_size", "tp_rank"), [(0, 0), (2, 2), (2, -1)])
def test_ranks_outside_the_group_are_refused(tp_size, tp_rank):
    with pytest.raises(TopologyError, match="does not exist"):
        VocabShard.split(10, tp_size, tp_rank)
