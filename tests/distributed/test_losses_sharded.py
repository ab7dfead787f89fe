"""The objective over a split vocabulary: loss and every gradient against the dense float64 reference."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megadistill.errors import DataError
from megadistill.losses import (
    IGNORE_INDEX,
    Head,
    LossConfig,
    QuantileGate,
    cross_entropy,
    distill_loss,
    fused,
    label_nats,
    label_scores,
    token_kl,
)
from megadistill.losses.difficulty import token_difficulty
from megadistill.losses.divergences import DIVERGENCES
from megadistill.losses.reference import reference_loss
from megadistill.parallel import VocabShard
from tests.support.backends import BACKENDS
from tests.support.objective import (
    MASKS,
    TOP_K,
    assert_same,
    dense_difficulty,
    leaf,
    make_gate,
    make_problem,
    make_rows,
    make_skews,
    run_fused,
    run_reference,
    with_logit_maps,
    with_temperatures,
    with_top_k,
)
from tests.support.spawn import run_ranks

CONFIG = LossConfig(sft=0.7, dac_kl=1.3, span=2.0, top_k=TOP_K, chunk_tokens=5)
SIZES = [1, 2, 3, 4]  # of 53 classes: 27 + 26, 18 + 18 + 17, 14 + 13 + 13 + 13


def shard_of(num_classes, rank):
    return VocabShard.split(num_classes, dist.get_world_size(), rank, dist.group.WORLD)


def same_everywhere(tensor):
    """Bit for bit the same on every rank."""
    others = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(others, tensor.contiguous())
    return all(torch.equal(tensor, other) for other in others)


def check(rank, problem, config, gate, dtype, tolerance):
    """One call on this rank against the whole problem in one process."""
    shard = shard_of(problem.num_classes, rank)
    expected = run_reference(problem, config, gate, shard)
    gate = None if gate is None else gate.to(dtype)
    output, gradients, teacher = run_fused(problem, config, gate, shard=shard, dtype=dtype)
    assert_same(output, gradients, expected, tolerance)
    if isinstance(teacher, Head):
        assert teacher.hidden.grad is None and teacher.weight.grad is None and teacher.bias.grad is None
    for name, value in vars(output).items():
        assert same_everywhere(value.detach()), f"{name} differs between the ranks"
    for name, gradient in gradients.items():
        if name == "hidden" or name.startswith("gate."):
            assert same_everywhere(gradient), f"the gradient of {name} differs between the ranks"


@pytest.mark.parametrize("tp_size", SIZES)
def test_float64_equals_the_reference(tp_size):
    def body(rank):
        for mask in MASKS:
            check(rank, make_problem(), CONFIG.replace(**mask), make_gate(upper=mask["upper"]), torch.float64, 1e-10)
        check(rank, with_logit_maps(make_problem()), CONFIG, make_gate(), torch.float64, 1e-10)

    run_ranks(body, tp_size)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("tp_size", [2, 3])
def test_every_backend_equals_the_reference(tp_size, backend):
    def body(rank):
        for mask in MASKS[0], MASKS[1], MASKS[6]:
            config = CONFIG.replace(backend=backend, **mask)
            check(rank, make_problem(), config, make_gate(upper=mask["upper"]), torch.float64, 1e-10)

    run_ranks(body, tp_size, timeout_s=400.0)


@pytest.mark.parametrize("tp_size", SIZES)
def test_divergences_equal_the_reference(tp_size):
    def body(rank):
        for divergence, temperature in itertools.product(["dac_kl", *DIVERGENCES], [1.0, 2.0]):
            config = CONFIG.replace(divergence=divergence, temperature=temperature, clip="off")
            check(rank, make_problem(), config, None, torch.float64, 1e-10)

    run_ranks(body, tp_size)


@pytest.mark.parametrize("tp_size", SIZES)
def test_skews_of_tokens_equal_the_reference(tp_size):
    def body(rank):
        for direction, temperature in itertools.product(["forward", "reverse"], [1.0, 2.0]):
            config = CONFIG.replace(divergence=f"skewed_{direction}_kl", temperature=temperature)
            check(rank, make_skews(make_problem()), config, None, torch.float64, 1e-10)
            check(rank, make_skews(with_top_k(make_problem(), 20, temperature)), config, None, torch.float64, 1e-10)

    run_ranks(body, tp_size)


@pytest.mark.parametrize("tp_size", SIZES)
def test_a_teacher_of_top_classes_equals_the_reference(tp_size):
    def body(rank):
        for mask, num_listed in itertools.product(MASKS, [1, 20, 53]):
            problem = with_top_k(make_problem(), num_listed, mask["temperature"])
            check(rank, problem, CONFIG.replace(**mask), make_gate(upper=mask["upper"]), torch.float64, 1e-10)

    run_ranks(body, tp_size)


@pytest.mark.parametrize("tp_size", SIZES)
def test_written_spans_equal_the_reference(tp_size):
    def body(rank):
        for relation, temperature in itertools.product(["joint", "log"], [1.0, 2.0]):
            config = CONFIG.replace(span_relation=relation, temperature=temperature)
            check(rank, make_problem(ignored=0.1), config, make_gate(), torch.float64, 1e-10)
            problem = with_top_k(make_problem(ignored=0.1), 20, temperature)
            check(rank, problem, config, make_gate(), torch.float64, 1e-10)
        check(rank, make_problem(seed=5), CONFIG.replace(span_relation="log"), make_gate(), torch.float32, 1e-5)

    run_ranks(body, tp_size)


@pytest.mark.parametrize("tp_size", SIZES)
def test_the_policy_term_equals_the_reference(tp_size):
    def body(rank):
        for reward, share in itertools.product(["token", "return"], [0.0, 0.2]):
            problem = make_rows(make_problem(), share)
            config = CONFIG.replace(policy=1.7, policy_reward=reward)
            check(rank, problem, config, make_gate(), torch.float64, 1e-10)
            check(rank, with_top_k(problem, 20), config, make_gate(), torch.float64, 1e-10)
        check(rank, make_rows(make_problem(seed=5), 0.2), config, make_gate(), torch.float32, 1e-5)

    run_ranks(body, tp_size)


@pytest.mark.parametrize("tp_size", SIZES)
def test_an_interpolated_teacher_equals_the_reference(tp_size):
    def body(rank):
        problem = replace(make_problem(), interpolation=0.4)
        for mask in MASKS[2], MASKS[5], MASKS[15]:
            check(rank, problem, CONFIG.replace(**mask), make_gate(upper=mask["upper"]), torch.float64, 1e-10)
        config = CONFIG.replace(divergence="reverse_kl", span_relation="joint", temperature=2.0)
        check(rank, problem, config, None, torch.float64, 1e-10)
        check(rank, replace(make_problem(seed=5), interpolation=0.7), config, None, torch.float32, 1e-5)

    run_ranks(body, tp_size)


@pytest.mark.parametrize("tp_size", SIZES)
def test_temperatures_of_tokens_equal_the_reference(tp_size):
    def body(rank):
        config = CONFIG.replace(sft=0.0, span=0.0, clip="off", temperature=1.5)
        for divergence, seed in (("forward_kl", 0), ("reverse_kl", 1), ("alpha_beta", 2)):
            problem = with_temperatures(make_problem(seed))
            check(rank, problem, config.replace(divergence=divergence), None, torch.float64, 1e-10)
        check(rank, problem, config, None, torch.float32, 1e-5)
        shard = shard_of(problem.num_classes, rank)
        student, teacher = leaf(problem.student, shard=shard), leaf(problem.teacher, shard=shard)
        found = token_difficulty(student, teacher, shard, temperature=1.5, chunk_tokens=4)
        torch.testing.assert_close(found, dense_difficulty(problem, 1.5), rtol=1e-10, atol=1e-12)
        assert same_everywhere(found)

    run_ranks(body, tp_size)


@pytest.mark.parametrize("tp_size", [2, 3])
def test_grouped_statistics_across_shards(tp_size):
    """Shards of 9,000 classes and more find the top K through groups; the last group is a short one."""

    def body(rank):
        problem = make_problem(length=5, num_classes=9001 * tp_size - 1)
        check(rank, problem, CONFIG, make_gate(), torch.float64, 1e-10)

    run_ranks(body, tp_size)


def test_ranks_with_unlike_memory_agree_on_the_chunks(monkeypatch):
    def body(rank):
        monkeypatch.setattr(fused, "_total_memory", lambda device: 2**22 if rank == 1 else 2**40)
        return fused.chunk_size("auto", VocabShard.split(2**12, 2, rank, dist.group.WORLD), torch.device("cpu"))

    sizes = run_ranks(body, 2)
    assert sizes == [16, 16]  # the small one's: 4 MiB would not hold even that


@pytest.mark.parametrize("tp_size", SIZES)
def test_float32_is_close_to_float64(tp_size):
    def body(rank):
        problem = make_problem(seed=5, length=40, num_classes=503)
        for mask in MASKS:
            config = CONFIG.replace(chunk_tokens="auto", **mask)
            check(rank, problem, config, make_gate(upper=mask["upper"]), torch.float32, 1e-5)

    run_ranks(body, tp_size)


@pytest.mark.parametrize("tp_size", [2, 3])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 18, "auto"])
def test_chunks_do_not_matter(tp_size, chunk_tokens):
    def body(rank):
        config = CONFIG.replace(chunk_tokens=chunk_tokens, gate_objective="maximize", coverage_target=0.0)
        check(rank, make_problem(seed=3), config, make_gate(), torch.float64, 1e-10)

    run_ranks(body, tp_size)


@pytest.mark.parametrize(("num_classes", "tp_size"), [(1, 2), (2, 3), (5, 4), (9, 4), (13, 2)])
def test_shards_may_be_tiny_or_empty(num_classes, tp_size):
    def body(rank):
        problem = make_problem(num_classes=num_classes)
        for mask in MASKS[::3]:
            check(rank, problem, CONFIG.replace(**mask), make_gate(upper=mask["upper"]), torch.float64, 1e-10)

    run_ranks(body, tp_size)


def test_shards_of_any_size():
    """A padded vocabulary that is sharded leaves the last shards short or empty."""

    def body(rank):
        start, stop = [(0, 20), (20, 40), (40, 53), (53, 53)][rank]
        shard = VocabShard(start, stop, 53, dist.group.WORLD)
        problem, gate = make_problem(), make_gate()
        expected = run_reference(problem, CONFIG, gate, shard)
        output, gradients, _ = run_fused(problem, CONFIG, gate, shard=shard)
        assert_same(output, gradients, expected, 1e-10)

    run_ranks(body, 4)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_cross_entropy_and_token_kl_equal_the_reference(tp_size):
    def body(rank):
        problem = make_problem(seed=2)
        shard = shard_of(problem.num_classes, rank)
        student, whole = leaf(problem.student, shard=shard), leaf(problem.student)
        expected = reference_loss(
            whole, problem.teacher, problem.labels, problem.pair_mask, None, LossConfig(clip="off"),
            num_tokens=9, num_pairs=1,
        )  # fmt: skip
        expected.sft.backward()
        for chunk_tokens in (4, "auto"):
            student.hidden.grad = student.weight.grad = student.bias.grad = None
            loss = cross_entropy(student, problem.labels, shard, num_tokens=9, chunk_tokens=chunk_tokens)
            loss.backward()
            torch.testing.assert_close(loss, expected.sft, rtol=1e-12, atol=0)
            torch.testing.assert_close(student.hidden.grad, whole.hidden.grad, rtol=1e-10, atol=1e-14)
            for name in ("weight", "bias"):
                whole_gradient = getattr(whole, name).grad[shard.start : shard.stop]
                torch.testing.assert_close(getattr(student, name).grad, whole_gradient, rtol=1e-10, atol=1e-14)
            kl_map, top1 = token_kl(student, leaf(problem.teacher, shard=shard), shard, chunk_tokens=chunk_tokens)
            is_valid = problem.labels != IGNORE_INDEX
            torch.testing.assert_close(kl_map[is_valid], expected.kl_map[is_valid], rtol=1e-10, atol=1e-13)
            assert torch.equal(top1[is_valid], expected.teacher_top1[is_valid])
            assert same_everywhere(kl_map) and same_everywhere(top1)

    run_ranks(body, tp_size)


@pytest.mark.parametrize("tp_size", SIZES)
def test_label_scores_equal_the_dense_ones(tp_size):
    def body(rank):
        for num_classes in (53, 2):  # two classes leave shards empty
            logits = torch.randn(9, num_classes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            labels, shard = torch.arange(9) % num_classes, shard_of(num_classes, rank)
            log_p, regret, rank_of = label_scores(logits[:, shard.start : shard.stop], labels, shard)
            dense = logits.log_softmax(-1)
            torch.testing.assert_close(log_p, dense[range(9), labels], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(regret, dense.amax(-1) - log_p, rtol=1e-12, atol=1e-12)
            assert torch.equal(rank_of, (logits > logits[range(9), labels].unsqueeze(-1)).sum(-1))
            columns = torch.eye(num_classes, dtype=torch.float64)[shard.start : shard.stop]
            nats = label_nats(Head(logits, columns), labels, shard, chunk_tokens=4)
            torch.testing.assert_close(nats, -dense[range(9), labels], rtol=1e-12, atol=1e-12)
            assert all(same_everywhere(part) for part in (log_p, regret, rank_of, nats))

    run_ranks(body, tp_size)


def test_token_kl_in_float32_with_all_mass_on_one_shard():
    """A shard whose teacher mass underflows adds nothing and breaks nothing."""

    def body(rank):
        shard = shard_of(6, rank)
        logits = torch.tensor([[0.0, -1.0, -2.0, -3e3, -4e3, -5e3], [1e3, 0.0, 0.0, 0.0, 0.0, 2e3]])
        student = torch.tensor([[0.0, 0.0, 0.0, 1.0, 2.0, 3.0], [5.0, 0.0, 0.0, 0.0, 0.0, 5.0]])
        columns = slice(shard.start, shard.stop)
        eye = torch.eye(6)[columns]
        kl_map, top1 = token_kl(Head(student, eye), Head(logits, eye), shard)
        log_p, log_q = logits.double().log_softmax(-1), student.double().log_softmax(-1)
        torch.testing.assert_close(kl_map.double(), (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-6, atol=1e-6)
        assert top1.tolist() == [0, 5]

    run_ranks(body, 3)


def test_ties_across_shards_take_the_lowest_class():
    def body(rank):
        shard = shard_of(9, rank)
        weight = torch.zeros(9, 1)
        weight[[2, 4, 8]] = 1.0
        teacher = Head(torch.ones(2, 1), weight[shard.start : shard.stop])
        output = distill_loss(
            teacher, teacher, torch.tensor([0, 8]), torch.zeros(2, dtype=torch.bool), QuantileGate(4),
            LossConfig(top_k=4), shard, num_tokens=2, num_pairs=0,
        )  # fmt: skip
        assert output.teacher_top1.tolist() == [2, 2]
        assert token_kl(teacher, teacher, shard)[1].tolist() == [2, 2]

    run_ranks(body, 4)


@pytest.mark.parametrize("length", [0, 4])
def test_a_call_without_valid_tokens(length):
    def body(rank):
        problem = make_problem(length=length, ignored=1.1)
        problem.num_tokens = 7
        gate = make_gate()
        output, gradients, _ = run_fused(problem, CONFIG, gate, shard=shard_of(problem.num_classes, rank))
        assert float(output.loss.detach()) == 0.0
        assert all(gradient is not None and not gradient.any() for gradient in gradients.values())

    run_ranks(body, 2)


def test_the_collectives_are_few_and_the_same_on_every_rank():
    """Four all-gathers a chunk, two of them for the threshold, and one all-reduce of a matrix, for any size."""

    def body(rank):
        sent = []
        gather, reduce = dist.all_gather, dist.all_reduce
        dist.all_gather = lambda rows, tensor, group: (
            sent.append(("gather", *tensor.shape)),
            gather(rows, tensor, group=group),
        )
        dist.all_reduce = lambda tensor, op, group: (
            sent.append(("reduce", *tensor.shape)),
            reduce(tensor, op=op, group=group),
        )
        problem = make_problem(length=12, ignored=0.0)
        run_fused(problem, CONFIG, make_gate(), shard=shard_of(problem.num_classes, rank))
        dist.all_gather, dist.all_reduce = gather, reduce
        return sent

    expected = [("reduce", 2)]  # the heads' largest biases
    expected += [("gather", rows, width) for rows in (5, 6, 3) for width in (6 + TOP_K, 7, 7, 12)] + [("reduce", 12, 7)]
    assert run_ranks(body, 3) == [expected] * 3


def test_data_parallel_groups_need_not_agree():
    """Two groups of two with different numbers of tokens: only the shard's own group communicates."""

    def body(rank):
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        mine = rank // 2
        problem = make_problem(seed=mine, length=[23, 3][mine])
        shard = VocabShard.split(problem.num_classes, 2, rank % 2, groups[mine])
        expected = run_reference(problem, CONFIG, make_gate(), shard)
        output, gradients, _ = run_fused(problem, CONFIG, make_gate(), shard=shard)
        assert_same(output, gradients, expected, 1e-10)

    run_ranks(body, 4)


def test_labels_outside_the_vocabulary_are_refused_on_every_rank():
    def body(rank):
        problem = make_problem()
        problem.labels[0] = 53
        with pytest.raises(DataError, match="label 53"):
            run_fused(problem, CONFIG, make_gate(), shard=shard_of(problem.num_classes, rank))

    run_ranks(body, 2)
