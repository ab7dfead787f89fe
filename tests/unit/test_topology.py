import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadistill.errors import TopologyError
from megadistill.parallel.topology import check_hpz_size, divisors, gradient_accumulation_steps, resolve_tp_size


def named(heads: list[int]) -> dict[str, int]:
    return {f"heads {number}": count for number, count in enumerate(heads)}


@pytest.mark.parametrize(
    ("world_size", "heads", "expected"),
    [
        (1, [8, 8], 1),
        (2, [8, 4], 2),
        (8, [8, 4], 4),
        (6, [12, 3], 3),
        (3, [8, 8], 1),
        (4, [12, 12, 6, 6], 2),
        (7, [], 7),
    ],
)
def test_auto_takes_the_largest_size_that_fits(world_size: int, heads: list[int], expected: int) -> None:
    assert resolve_tp_size("auto", world_size, named(heads)) == expected


@given(st.integers(1, 64), st.lists(st.integers(1, 96), min_size=1, max_size=4))
def test_auto_is_allowed_and_nothing_larger_is(world_size: int, heads: list[int]) -> None:
    tp_size = resolve_tp_size("auto", world_size, named(heads))
    fits = [n for n in range(1, world_size + 1) if world_size % n == 0 and all(count % n == 0 for count in heads)]
    assert tp_size == max(fits)
    for size in range(1, world_size + 1):
        if size in fits:
            assert resolve_tp_size(size, world_size, named(heads)) == size
        else:
            with pytest.raises(TopologyError):
                resolve_tp_size(size, world_size, named(heads))


def test_a_size_that_does_not_divide_the_processes() -> None:
    with pytest.raises(TopologyError, match=r"size of 3 .*processes, 4; allowed with these models: 1, 2$"):
        resolve_tp_size(3, 4, named([6]))


def test_a_size_that_does_not_divide_the_heads() -> None:
    with pytest.raises(TopologyError, match=r"size of 4 .*divide the 2 key-value heads of B; allowed with 8 .*: 1, 2$"):
        resolve_tp_size(4, 8, {"attention heads of A": 8, "attention heads of B": 4, "key-value heads of B": 2})


def test_micro_steps() -> None:
    assert gradient_accumulation_steps(16, 4, 1) == 4
    assert gradient_accumulation_steps(16, 4, 4) == 1
    assert gradient_accumulation_steps(12, 2, 3) == 2


def test_examples_that_cannot_be_shared() -> None:
    with pytest.raises(TopologyError, match=r"batch of 16 examples .*3 data-parallel ranks.*: 12, 24$"):
        gradient_accumulation_steps(16, 4, 3)
    with pytest.raises(TopologyError, match=r"is 4 examples per rank.*micro-batch size 8; allowed: 1, 2, 4$"):
        gradient_accumulation_steps(8, 8, 2)
    with pytest.raises(TopologyError, match=r": 4$"):
        gradient_accumulation_steps(2, 1, 4)


def test_secondary_partitions() -> None:
    check_hpz_size(1, 1)
    check_hpz_size(4, 8)
    with pytest.raises(TopologyError, match=r"over 3 ranks .*data-parallel ranks, 4; allowed: 1, 2, 4$"):
        check_hpz_size(3, 4)


def test_divisors() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
