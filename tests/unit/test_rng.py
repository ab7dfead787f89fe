"""Counter-based random numbers: known answers, independence of order and layout, uniformity."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megadistill.parallel.rng import philox4x32, uniform


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    words = philox4x32(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == expected


def _philox_in_python(counter, key):
    """The same with Python's integers, which do not overflow."""
    x, (k0, k1) = list(counter), key
    for _ in range(10):
        a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(b >> 32) ^ x[1] ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ x[3] ^ k1, a & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return tuple(x)


words = st.integers(0, 2**32 - 1)


@settings(deadline=None, max_examples=50)
@given(counter=st.tuples(words, words, words, words), key=st.tuples(words, words))
def test_philox_equals_arbitrary_precision(counter, key):
    words = philox4x32(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == _philox_in_python(counter, key)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    sequence=st.integers(-(2**63), 2**63 - 1),
    position=st.integers(0, 2**32 - 1),
    stream=st.integers(0, 2**32 - 1),
)
def test_a_number_is_a_function_of_its_key_only(seed, sequence, position, stream):
    alone = uniform(seed, torch.tensor([sequence]), torch.tensor([position]), stream=stream)
    among = uniform(seed, torch.tensor([3, sequence, 4]), torch.tensor([1, position, 5]), stream=stream)
    assert alone.dtype == torch.float64 and 0 < float(alone) < 1
    assert float(among[1]) == float(alone)


def test_extreme_words_stay_inside_the_open_interval(monkeypatch):
    for word in (0, 2**32 - 1):
        fixed = (torch.tensor([word]),) * 4
        monkeypatch.setattr("megadistill.parallel.rng.philox4x32", lambda counter, key, fixed=fixed: fixed)
        assert 0.0 < float(uniform(0, torch.tensor([0]), torch.tensor([0]))) < 1.0


def test_every_part_of_the_key_matters():
    def draw(seed=1, sequence=2, position=3, stream=4):
        return float(uniform(seed, torch.tensor([sequence]), torch.tensor([position]), stream=stream))

    others = [
        draw(seed=2), draw(seed=1 + 2**32), draw(seed=-1), draw(sequence=3), draw(sequence=2 + 2**32),
        draw(sequence=-2), draw(position=4), draw(stream=5), draw(sequence=3, position=2),
    ]  # fmt: skip
    assert len({draw(), *others}) == len(others) + 1


def test_numbers_are_uniform_and_uncorrelated():
    count = 200_000
    x = uniform(7, torch.arange(count), torch.zeros(count, dtype=torch.int64)).numpy()
    counts = np.bincount((x * 100).astype(int), minlength=100)
    chi_square = ((counts - count / 100) ** 2 / (count / 100)).sum()
    assert chi_square < 170  # 99 degrees of freedom: p = 1e-5
    for neighbors in (
        uniform(7, torch.arange(1, count + 1), torch.zeros(count, dtype=torch.int64)).numpy(),
        uniform(7, torch.arange(count), torch.ones(count, dtype=torch.int64)).numpy(),
        uniform(8, torch.arange(count), torch.zeros(count, dtype=torch.int64)).numpy(),
    ):
        assert abs(np.corrcoef(x, neighbors)[0, 1]) < 5 / count**0.5


def test_no_numbers():
    empty = torch.zeros(0, dtype=torch.int64)
    assert uniform(0, empty, empty).shape == (0,)
