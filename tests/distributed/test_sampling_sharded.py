"""Sampling over a split vocabulary: the tokens of one rank, on every rank, without gathering logits."""

import pytest
import torch
import torch.distributed as dist

from megadistill.config.sampling import SamplingOptions
from megadistill.decoding.mixture import MixtureDrawer
from megadistill.decoding.sampling import NO_TOKEN, Sampling, sample_tokens
from megadistill.parallel import VocabShard
from tests.support.sampling import expected_probabilities
from tests.support.spawn import run_ranks

SETTINGS = [
    {}, {"temperature": 0.6}, {"temperature": 0.0}, {"top_k": 1}, {"top_k": 7}, {"top_k": 60}, {"top_p": 0.2},
    {"top_p": 0.5}, {"top_p": 0.95}, {"top_k": 9, "top_p": 0.7}, {"top_k": 30, "top_p": 0.9, "temperature": 1.7},
]  # fmt: skip


def sample(logits, shard, **options):
    count = len(logits)
    return sample_tokens(
        logits[:, shard.start : shard.stop], shard, seed=11, sequence_ids=torch.arange(count) % 97,
        positions=torch.arange(count) // 97, **options,
    )  # fmt: skip


def logits_of(kind, dtype=torch.float32, num_examples=300, num_classes=101):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(num_examples, num_classes, generator=generator) * 2
    if kind == "ties":
        logits = torch.round(logits)
    if kind == "peaked":
        logits = logits * 40
    if kind == "one shard":
        logits[:, : num_classes - 5] = -torch.inf
    return logits.to(dtype)


@pytest.mark.parametrize("tp_size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_layout_draws_the_tokens_of_one_rank(tp_size, dtype):
    whole = VocabShard(0, 101, 101)
    expected = {
        (kind, i): sample(logits_of(kind, dtype), whole, **options)
        for kind in ("plain", "ties", "peaked", "one shard")
        for i, options in enumerate(SETTINGS)
    }

    def body(rank):
        shard = VocabShard.split(101, tp_size, rank, dist.group.WORLD)
        return {(kind, i): sample(logits_of(kind, dtype), shard, **SETTINGS[i]) for kind, i in expected}

    for results in run_ranks(body, tp_size):
        for key, tokens in expected.items():
            assert torch.equal(results[key], tokens), (key[0], SETTINGS[key[1]])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_every_rank_knows_of_a_class_of_one_rank_that_is_not_finite(value):
    """In whichever shard, also beside shards without a class; the other rows do not change."""
    num_classes = 2
    logits = {count: logits_of("plain", num_examples=12, num_classes=count) for count in (num_classes, 101)}
    expected = [{count: sample(rows, VocabShard(0, count, count), **options) for count, rows in logits.items()}
                for options in SETTINGS]  # fmt: skip

    def body(rank):
        found = []
        for options in SETTINGS:
            tokens = {}
            for count, rows in logits.items():
                broken = rows.clone()
                broken[3, 0], broken[7, count - 1], broken[9] = value, value, -torch.inf
                tokens[count] = sample(broken, VocabShard.split(count, 3, rank, dist.group.WORLD), **options)
            found.append(tokens)
        return found

    for found in run_ranks(body, 3):
        for options, tokens, whole in zip(SETTINGS, found, expected, strict=True):
            for count in logits:
                is_broken = torch.tensor([row in (3, 7, 9) for row in range(12)])
                assert torch.equal(tokens[count], torch.where(is_broken, NO_TOKEN, whole[count])), (options, count)


def test_tiny_and_empty_shards():
    def body(rank):
        tokens = []
        for num_classes in (1, 2, 3, 5):
            logits = logits_of("ties", num_classes=num_classes)
            shard = VocabShard.split(num_classes, 4, rank, dist.group.WORLD)
            whole = VocabShard(0, num_classes, num_classes)
            for options in SETTINGS:
                tokens = sample(logits, shard, **options)
                assert torch.equal(tokens, sample(logits, whole, **options)), (num_classes, options)
        return tokens

    run_ranks(body, 4)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_tokens_survive_round_off_of_the_logits(tp_size):
    """Logits that differ by 1e-7 between layouts change a token with a probability of the same size."""
    logits = logits_of("plain", num_examples=2000)
    expected = sample(logits, VocabShard(0, 101, 101))

    def body(rank):
        shard = VocabShard.split(101, tp_size, rank, dist.group.WORLD)
        noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(rank))
        return sample(logits + 1e-7 * noise, shard)

    assert all(torch.equal(tokens, expected) for tokens in run_ranks(body, tp_size))


@pytest.mark.parametrize("options", [{}, {"top_k": 6}, {"top_p": 0.8}])
def test_frequencies_pass_a_chi_square_test(options):
    logits, count = logits_of("ties", num_examples=1, num_classes=29)[0], 20_000

    def body(rank):
        shard = VocabShard.split(29, 3, rank, dist.group.WORLD)
        return sample(logits.expand(count, -1), shard, **options)

    observed = torch.bincount(run_ranks(body, 3)[0], minlength=29).double()
    probabilities = expected_probabilities(logits, **options)
    kept = probabilities > 0
    assert not observed[~kept].any()
    chi_square = float(((observed - count * probabilities)[kept] ** 2 / (count * probabilities[kept])).sum())
    freedom = int(kept.sum()) - 1
    assert chi_square <= freedom + 4.5 * (2 * freedom) ** 0.5 + 10


@pytest.mark.parametrize(
    ("options", "most"), [({}, 2), ({"temperature": 0.0}, 1), ({"top_k": 6}, 6), ({"top_p": 0.8}, 15)]
)
def test_no_exchange_carries_logits(options, most):
    """Whatever is sent has a few numbers per example, however many classes a shard holds."""

    def body(rank):
        sent = []
        gather, reduce = dist.all_gather, dist.all_reduce
        dist.all_gather = lambda out, tensor, group: (sent.append(tensor.numel()), gather(out, tensor, group=group))
        dist.all_reduce = lambda tensor, op, group: (sent.append(tensor.numel()), reduce(tensor, op=op, group=group))
        logits = logits_of("plain", num_examples=10, num_classes=4000)
        sample(logits, VocabShard.split(4000, 2, rank, dist.group.WORLD), **options)
        dist.all_gather, dist.all_reduce = gather, reduce
        return sent

    first, second = run_ranks(body, 2)
    assert first == second and max(first) <= 10 * most


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4])
def test_a_mixture_is_the_same_on_every_layout(tp_size):
    generator = torch.Generator().manual_seed(2)
    student, teacher = 3 * torch.randn(2, 300, 53, generator=generator)
    numbers = torch.rand(300, generator=generator, dtype=torch.float64)
    numbers[:3] = torch.tensor([0.2, 2.0**-53, 1 - 2.0**-52])  # the border of the parts, and both ends
    for sampling in (Sampling(), Sampling(temperature=0.7, options=SamplingOptions(top_p=0.9))):
        whole = MixtureDrawer(VocabShard(0, 53, 53), sampling, 300, 0.2)(torch.cat([student, teacher], -1), numbers)
        assert int(whole.min()) >= 0 and int(whole.max()) < 53

        def body(rank, sampling=sampling):
            shard = VocabShard.split(53, tp_size, rank, dist.group.WORLD)
            parts = [logits[:, shard.start : shard.stop] for logits in (student, teacher)]
            return MixtureDrawer(shard, sampling, 300, 0.2)(torch.cat(parts, -1), numbers)

        assert all(torch.equal(drawn, whole) for drawn in run_ranks(body, tp_size))
