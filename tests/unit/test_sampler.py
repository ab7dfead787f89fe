"""Batches as a pure function of the step, whatever the number of data-parallel ranks."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadistill.data.sampler import BatchSampler
from megadistill.errors import ConfigError, TopologyError


def sampler(**changes):
    return BatchSampler(**{
        "num_rows": 10, "num_prompt_rows": 7, "prompts_ratio": 0.25, "global_batch_size": 8, "seed": 3, **changes
    })  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 30),
    num_prompt_rows=st.integers(1, 30),
    # Shares that leave both streams a row; others are refused (next test).
    ratio=st.one_of(st.just(0.0), st.floats(0.05, 0.95)),
    dp_size=st.sampled_from([1, 2, 3, 4, 6, 12]),
    step=st.integers(0, 50),
)
def test_ranks_together_have_the_global_batch_at_every_layout(num_rows, num_prompt_rows, ratio, dp_size, step):
    common = {
        "num_rows": num_rows,
        "num_prompt_rows": num_prompt_rows,
        "prompts_ratio": ratio,
        "global_batch_size": 12,
    }
    whole = sampler(**common).rows(step)
    assert [row.sequence_id for row in whole] == list(range(step * 12, step * 12 + 12))
    parts = [sampler(**common, dp_rank=rank, dp_size=dp_size).rows(step) for rank in range(dp_size)]
    assert all(len(part) == 12 // dp_size for part in parts)
    assert all(row.sequence_id % 12 % dp_size == rank for rank, part in enumerate(parts) for row in part)
    assert sorted(row for part in parts for row in part) == whole
    assert sum(row.stream == "train" for row in whole) == round(12 * (1 - ratio))
    assert all(0 <= row.row_index < (num_rows if row.stream == "train" else num_prompt_rows) for row in whole)


@pytest.mark.parametrize(("ratio", "stream"), [(0.01, "prompts"), (0.99, "train")])
def test_a_share_that_leaves_a_stream_no_row_is_refused(ratio, stream):
    with pytest.raises(ConfigError, match=f"leaves no {'training' if stream == 'train' else 'prompt'} row") as error:
        sampler(prompts_ratio=ratio)
    assert error.value.setting == "data.prompts_ratio, train.global_batch_size"


def test_every_epoch_of_each_stream_holds_every_row_once_in_a_new_order():
    drawn = {"train": [], "prompts": []}
    for step in range(35):
        for row in sampler().rows(step):
            drawn[row.stream].append(row.row_index)
    for stream, size in (("train", 10), ("prompts", 7)):
        epochs = [drawn[stream][at : at + size] for at in range(0, len(drawn[stream]) - size + 1, size)]
        assert len(epochs) >= 7
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_any_order_of_questions_gives_the_same_answers():
    forwards = [sampler().rows(step) for step in range(20)]
    backwards = [sampler().rows(step) for step in reversed(range(20))][::-1]
    assert forwards == backwards
    assert sampler(seed=4).rows(0) != sampler().rows(0)


def test_the_streams_are_drawn_independently():
    equal = sampler(num_rows=50, num_prompt_rows=50, prompts_ratio=0.5, global_batch_size=50).rows(0)
    train = [row.row_index for row in equal if row.stream == "train"]
    prompts = [row.row_index for row in equal if row.stream == "prompts"]
    assert train != prompts


def test_the_order_is_pinned():
    """Resuming a run that an earlier version began needs the same permutations forever."""
    assert [row.row_index for row in sampler().rows(0)] == [1, 0, 2, 5, 7, 4, 2, 0]


def test_a_batch_larger_than_the_data_takes_rows_again():
    counts = Counter(row.row_index for row in sampler(num_rows=3, prompts_ratio=0.0, global_batch_size=8).rows(0))
    assert sorted(counts.values()) == [2, 3, 3]


def test_no_prompts_needed_no_prompts_drawn():
    rows = sampler(num_prompt_rows=0, prompts_ratio=0.0).rows(5)
    assert {row.stream for row in rows} == {"train"}


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ConfigError, match=r"prompt row.*there are none"):
        sampler(num_prompt_rows=0)
    with pytest.raises(ConfigError, match=r"training row.*there are none"):
        sampler(num_rows=0)
    with pytest.raises(ConfigError, match=r"1\.5"):
        sampler(prompts_ratio=1.5)
    with pytest.raises(ConfigError, match="batch of 0 rows"):
        sampler(global_batch_size=0)
    with pytest.raises(TopologyError, match="8 rows is not a multiple of the data-parallel size 3"):
        sampler(dp_size=3)
