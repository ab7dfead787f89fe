"""Sampling on one rank: the right distribution, the right support, the same token however examples are batched."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megadistill.decoding.sampling import NO_TOKEN, sample_tokens
from megadistill.errors import ConfigError
from megadistill.parallel import VocabShard
from megadistill.parallel.rng import uniform
from tests.support.sampling import expected_probabilities, expected_tokens

SETTINGS = [
    {}, {"temperature": 0.5}, {"temperature": 3.0}, {"top_k": 1}, {"top_k": 4}, {"top_k": 100}, {"top_p": 0.3},
    {"top_p": 0.5}, {"top_p": 0.9}, {"top_p": 0.999999}, {"top_p": 1e-9}, {"top_k": 5, "top_p": 0.6},
    {"top_k": 5, "top_p": 0.95, "temperature": 2.0},
]  # fmt: skip


def draw(logits, seed=0, start=0, **options):
    count = len(logits)
    return sample_tokens(
        logits, VocabShard(0, logits.shape[1], logits.shape[1]), seed=seed,
        sequence_ids=torch.arange(start, start + count), positions=torch.zeros(count, dtype=torch.int64), **options,
    )  # fmt: skip


def row_of_logits(dtype):
    """Three tied classes, one excluded, both signs of zero."""
    logits = torch.tensor([0.3, -1.0, -torch.inf, 1.2, 0.0, 1.2, -0.0, 1.2, 2.0, -4.0, 0.7])
    return logits.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", SETTINGS)
def test_tokens_equal_the_written_out_inverse_cdf(dtype, options):
    logits = row_of_logits(dtype)
    tokens = draw(logits.expand(400, -1), seed=5, **options)
    numbers = uniform(5, torch.arange(400), torch.zeros(400, dtype=torch.int64))
    assert torch.equal(tokens, expected_tokens(expected_probabilities(logits, **options), numbers))


@pytest.mark.parametrize("options", SETTINGS)
def test_frequencies_pass_a_chi_square_test(options):
    logits, count = row_of_logits(torch.float32), 40_000
    tokens = draw(logits.expand(count, -1), seed=1, **options)
    probabilities = expected_probabilities(logits, **options)
    observed = torch.bincount(tokens, minlength=len(logits)).double()
    assert not observed[probabilities == 0].any()
    kept = probabilities > 0
    chi_square = float(((observed - count * probabilities)[kept] ** 2 / (count * probabilities[kept])).sum())
    freedom = int(kept.sum()) - 1
    assert chi_square <= freedom + 4.5 * (2 * freedom) ** 0.5 + 10


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 10**6),
    num_classes=st.integers(1, 40),
    scale=st.sampled_from([0.0, 0.1, 1.0, 10.0, 1000.0]),
    levels=st.sampled_from([2, 5, 10**6]),
    temperature=st.sampled_from([0.01, 0.7, 1.0, 10.0]),
    top_k=st.integers(0, 45),
    top_p=st.sampled_from([0.01, 0.25, 0.5, 0.75, 0.9, 1.0]),
)
def test_tokens_equal_the_written_out_inverse_cdf_for_drawn_logits(
    seed, num_classes, scale, levels, temperature, top_k, top_p
):
    generator = torch.Generator().manual_seed(seed)
    # Few levels make many ties.
    logits = torch.round(torch.rand(3, num_classes, generator=generator) * levels) / levels * scale
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    tokens = draw(logits, seed=seed, **options)
    numbers = uniform(seed, torch.arange(3), torch.zeros(3, dtype=torch.int64))
    for i in range(3):
        probabilities = expected_probabilities(logits[i], **options)
        assert int(tokens[i]) == int(expected_tokens(probabilities, numbers[i : i + 1]))


@pytest.mark.parametrize("options", SETTINGS)
def test_a_row_does_not_depend_on_its_batch(options):
    logits = torch.randn(12, 200, generator=torch.Generator().manual_seed(0))
    whole = draw(logits, **options)
    for size in (1, 5):
        parts = [draw(logits[i : i + size], start=i, **options) for i in range(0, 12, size)]
        assert torch.equal(torch.cat(parts), whole)


def test_position_sequence_and_stream_choose_the_number():
    logits = torch.zeros(1, 10**6)
    shard, ids = VocabShard(0, 10**6, 10**6), torch.tensor([3])

    def token(sequence=3, position=4, **options):
        return int(
            sample_tokens(
                logits,
                shard,
                sequence_ids=torch.tensor([sequence]),
                positions=torch.tensor([position]),
                **{"seed": 1, **options},
            )  # fmt: skip
        )

    assert ids.tolist() == [3] and token() == token()
    assert len({token(), token(sequence=4), token(position=5), token(seed=2), token(stream=1)}) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_greedy_takes_the_lowest_of_tied_classes(dtype):
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [-5.0, -5.0, -5.0, -5.0], [-torch.inf, -1.0, 0.0, -torch.inf]])
    assert draw(logits.to(dtype), temperature=0.0).tolist() == [1, 0, 2]
    assert draw(logits.to(dtype), temperature=0.0, top_k=2, top_p=0.5).tolist() == [1, 0, 2]


def test_a_low_temperature_is_greedy():
    logits = torch.randn(50, 100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(logits, temperature=1e-6), logits.argmax(-1))


@pytest.mark.parametrize("number", [2.0**-53, 0.5, 1 - 2.0**-53])
@pytest.mark.parametrize("logits", [[-torch.inf, 0.0, -800.0], [0.0, -800.0, -torch.inf], [0.0, 0.0, -800.0]])
def test_classes_without_mass_are_never_drawn(number, logits, monkeypatch):
    monkeypatch.setattr(
        "megadistill.decoding.sampling.uniform",
        lambda seed, sequence_ids, positions, stream=0: torch.full((1,), number, dtype=torch.float64),
    )
    for options in SETTINGS:
        assert logits[int(draw(torch.tensor([logits]), **options))] == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [*SETTINGS, {"temperature": 0.0}])
def test_rows_without_a_distribution_have_no_token(options, dtype):
    """Wherever the one class is that is not a number; with -NaN, as processors make it; and no other row changes."""
    logits = torch.randn(9, 300, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = draw(logits, **options)
    broken = logits.clone()
    broken[1, 0], broken[2, 299], broken[3], broken[4, 150] = torch.nan, torch.nan, torch.nan, torch.inf
    broken[5], broken[6, int(logits[6].argmin())], broken[7, :2] = -torch.inf, -torch.tensor(torch.nan), torch.inf
    tokens = draw(broken, **options)
    assert tokens[1:8].tolist() == [NO_TOKEN] * 7
    assert tokens[0] == expected[0] and tokens[8] == expected[8]


def test_no_rows():
    for options in [*SETTINGS, {"temperature": 0.0}]:
        assert draw(torch.zeros(0, 7), **options).shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature"), ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"), ({"top_p": 0.0}, "top_p"), ({"top_p": 1.1}, "top_p"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        draw(torch.zeros(2, 5), **options)


def test_shapes_that_do_not_fit_are_refused():
    ids = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected \[B, 5\]"):
        sample_tokens(torch.zeros(2, 4), VocabShard(0, 5, 5), seed=0, sequence_ids=ids, positions=ids)
    with pytest.raises(ValueError, match=r"must be \(3,\)"):
        sample_tokens(torch.zeros(3, 5), VocabShard(0, 5, 5), seed=0, sequence_ids=ids, positions=ids)
    with pytest.raises(ConfigError, match="needs its process group"):
        sample_tokens(torch.zeros(2, 4), VocabShard(0, 4, 5), seed=0, sequence_ids=ids, positions=ids)
