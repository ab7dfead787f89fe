"""The fused objective, cross-entropy and KL map against the dense reference on one rank."""

from dataclasses import replace

import pytest
import torch

from megadistill.losses import IGNORE_INDEX, Head, LossConfig, cross_entropy, distill_loss, token_kl
from megadistill.losses.reference import reference_loss
from megadistill.parallel import VocabShard
from tests.support.backends import BACKENDS
from tests.support.objective import (
    MASKS,
    TOP_K,
    Problem,
    assert_same,
    leaf,
    make_gate,
    make_problem,
    run_fused,
    run_reference,
    with_logit_maps,
    with_temperatures,
)

CONFIG = LossConfig(sft=0.7, dac_kl=1.3, span=2.0, top_k=TOP_K, chunk_tokens=5)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def whole(problem: Problem) -> VocabShard:
    return VocabShard(0, problem.num_classes, problem.num_classes)


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: "-".join(str(value) for value in mask.values()))
def test_values_and_gradients_equal_the_reference(backend, mask):
    problem, gate = make_problem(), make_gate(upper=mask["upper"])
    config = CONFIG.replace(backend=backend, **mask)
    output, gradients, _ = run_fused(problem, config, gate)
    assert_same(output, gradients, run_reference(problem, config, gate), 1e-10)


@pytest.mark.parametrize("chunk_tokens", [1, 2, 7, 17, 18, 1000, "auto"])
def test_chunks_do_not_matter(backend, chunk_tokens):
    problem, gate = make_problem(seed=3), make_gate()
    config = CONFIG.replace(chunk_tokens=chunk_tokens, backend=backend)
    output, gradients, _ = run_fused(problem, config, gate)
    assert_same(output, gradients, run_reference(problem, config, gate), 1e-10)


@pytest.mark.parametrize(
    "change",
    [
        {"sft": 0.0}, {"dac_kl": 0.0}, {"span": 0.0}, {"sft": 0.0, "span": 0.0}, {"dac_kl": 0.0, "span": 0.0},
        {"gate_objective": "maximize"}, {"guards": False}, {"coverage_weight": 3.0, "coverage_target": 0.0},
        {"softness": 0.05}, {"span_eps": 1e-2}, {"sft": 0.0, "temperature": 3.0},
        {"clip": "fixed", "lower": 0.3, "upper": 0.6},
        {"clip": "fixed", "lower": 0.2, "softness": 0.02}, {"clip": "fixed", "lower": 0.0, "upper": 1.0},
        {"clip": "entropy", "lower": 0.6, "softness": 1.5}, {"clip": "fixed", "lower": 0.9, "upper": 0.99},
    ],
)  # fmt: skip
def test_options_equal_the_reference(backend, change):
    problem, gate, config = make_problem(seed=4), make_gate(), CONFIG.replace(backend=backend, **change)
    output, gradients, _ = run_fused(problem, config, gate)
    values, expected = run_reference(problem, config, gate)
    for name in ("sft", "dac_kl", "span"):  # a term of weight 0 is not computed
        values[name] = values[name] * (getattr(config, name) > 0)
    assert_same(output, gradients, (values, expected), 1e-10)


@pytest.mark.parametrize("mask", [MASKS[0], MASKS[-1]], ids=["gate", "off"])
def test_bent_logits_equal_the_reference(backend, mask):
    problem, gate = with_logit_maps(make_problem(seed=4)), make_gate(upper=mask["upper"])
    swapped = replace(problem, student=problem.teacher, teacher=problem.student)
    alone = CONFIG.replace(sft=0.0, span=0.0, clip="off")
    for case, settings in ((problem, {}), (swapped, {}), (with_temperatures(problem), None)):
        config = (alone if settings is None else CONFIG.replace(**mask)).replace(backend=backend)
        output, gradients, _ = run_fused(case, config, gate)
        assert_same(output, gradients, run_reference(case, config, gate), 1e-10)
    student = leaf(problem.student)
    nats = cross_entropy(student, problem.labels, whole(problem), num_tokens=3, backend=backend, chunk_tokens=4)
    nats.backward()
    plain = leaf(problem.student)
    logits = 3.0 * torch.tanh(torch.nn.functional.linear(plain.hidden, plain.weight, plain.bias) * 1.5 / 3.0)
    expected = torch.nn.functional.cross_entropy(logits, problem.labels, ignore_index=IGNORE_INDEX, reduction="sum") / 3
    expected.backward()
    torch.testing.assert_close(nats, expected)
    for name in ("hidden", "weight", "bias"):
        torch.testing.assert_close(getattr(student, name).grad, getattr(plain, name).grad)


@pytest.mark.parametrize("num_classes", [8192, 8200, 9000])
@pytest.mark.parametrize(("clip", "temperature"), [("gate", 1.0), ("gate", 2.0), ("off", 1.0)])
def test_vocabularies_with_grouped_statistics(backend, num_classes, clip, temperature):
    """From 8192 classes the teacher's top K is gradients through groups of 64; the last group may be shorter."""
    problem, gate = make_problem(length=6, num_classes=num_classes), make_gate()
    config = CONFIG.replace(clip=clip, temperature=temperature, backend=backend)
    output, gradients, _ = run_fused(problem, config, gate)
    assert_same(output, gradients, run_reference(problem, config, gate), 1e-10)


@pytest.mark.parametrize("num_classes", [1, 2, 5, TOP_K, TOP_K + 1])
@pytest.mark.parametrize("clip", ["gate", "fixed"])
def test_vocabularies_smaller_than_the_top_k(backend, num_classes, clip):
    problem, gate = make_problem(num_classes=num_classes), make_gate()
    config = CONFIG.replace(clip=clip, backend=backend)
    output, gradients, _ = run_fused(problem, config, gate)
    expected = run_reference(problem, config, gate)
    assert_same(output, gradients, expected, 1e-10)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_counts_are_the_only_normalization():
    """Two micro-batches with the global counts add up to one batch: values, gradients and the gate's gradients."""
    problem, gate = make_problem(seed=8, length=24), make_gate()
    problem.pair_mask[11] = False  # spans do not cross micro-batches
    is_valid = problem.labels != IGNORE_INDEX
    problem.num_pairs = int((problem.pair_mask[:-1] & is_valid[:-1] & is_valid[1:]).sum())
    values, expected = run_reference(problem, CONFIG, gate)
    student = leaf(problem.student)
    gate.zero_grad()
    outputs = []
    for positions in (slice(0, 12), slice(12, 24)):
        output = distill_loss(
            Head(student.hidden[positions], student.weight, student.bias),
            Head(problem.teacher.hidden[positions], problem.teacher.weight, problem.teacher.bias),
            problem.labels[positions], problem.pair_mask[positions], gate, CONFIG, whole(problem),
            num_tokens=torch.tensor(problem.num_tokens), num_pairs=float(problem.num_pairs),
        )  # fmt: skip
        output.loss.backward()
        outputs.append(output)
    for name in ("loss", "sft", "dac_kl", "span", "kept_mass", "mean_lower", "mean_upper"):
        torch.testing.assert_close(sum(getattr(output, name).detach() for output in outputs), values[name])
    gradients = {"hidden": student.hidden.grad, "weight": student.weight.grad, "bias": student.bias.grad}
    gradients |= {f"gate.{name}": parameter.grad for name, parameter in gate.named_parameters()}
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-12)


def test_no_pairs_no_span():
    problem = make_problem()
    problem.pair_mask[:] = False
    problem.num_pairs = 0
    output, gradients, _ = run_fused(problem, CONFIG, make_gate())
    assert float(output.span) == 0.0
    expected = run_reference(problem, CONFIG.replace(span=0.0), make_gate())
    assert_same(output, gradients, expected, 1e-10)


def test_a_pair_needs_both_tokens_and_the_last_one_has_none():
    """Pairs with an ignored token are dropped, also where dropping it makes others adjacent."""
    problem = make_problem(length=6, ignored=0.0)
    problem.labels[2] = IGNORE_INDEX
    problem.pair_mask[:] = True
    problem.num_pairs = 1
    output, gradients, _ = run_fused(problem, CONFIG, make_gate())
    assert_same(output, gradients, run_reference(problem, CONFIG, make_gate()), 1e-10)
    problem.pair_mask[:] = torch.tensor([True, False, False, True, True, False])
    assert torch.equal(run_fused(problem, CONFIG, make_gate())[0].span, output.span)


def test_ties_take_the_lowest_class():
    hidden = torch.ones(3, 2, dtype=torch.float64)
    weight = torch.zeros(6, 2, dtype=torch.float64)
    weight[2] = weight[4] = 1.0
    teacher = Head(hidden, weight)
    student = Head(hidden, torch.arange(12, dtype=torch.float64).view(6, 2) / 10)
    shard = VocabShard(0, 6, 6)
    config = LossConfig(clip="fixed", top_k=3)
    output = distill_loss(
        student, teacher, torch.tensor([0, 1, 5]), torch.zeros(3, dtype=torch.bool), None, config, shard,
        num_tokens=3, num_pairs=0,
    )  # fmt: skip
    assert output.teacher_top1.tolist() == [2, 2, 2]
    assert token_kl(student, teacher, shard)[1].tolist() == [2, 2, 2]


@pytest.mark.parametrize("length", [0, 1, 23])
@pytest.mark.parametrize("chunk_tokens", [1, 4, "auto"])
def test_token_kl_equals_the_reference(backend, length, chunk_tokens):
    problem = make_problem(length=length, ignored=0.0)
    student = leaf(problem.student)
    kl_map, top1 = token_kl(student, problem.teacher, whole(problem), chunk_tokens=chunk_tokens, backend=backend)
    assert not kl_map.requires_grad
    expected = reference_loss(
        student, problem.teacher, problem.labels, problem.pair_mask, None, LossConfig(clip="off"),
        num_tokens=1, num_pairs=1,
    )  # fmt: skip
    torch.testing.assert_close(kl_map, expected.kl_map, rtol=1e-10, atol=1e-12)
    assert torch.equal(top1, expected.teacher_top1)


def test_token_kl_is_the_kl_map_of_the_objective():
    problem = make_problem(ignored=0.0)
    output, _, _ = run_fused(problem, CONFIG, make_gate())
    torch.testing.assert_close(token_kl(problem.student, problem.teacher, whole(problem))[0], output.kl_map)


def test_token_kl_of_equal_models_is_zero():
    problem = make_problem(ignored=0.0)
    kl_map, _ = token_kl(problem.teacher, problem.teacher, whole(problem))
    assert (kl_map >= 0).all() and float(kl_map.max()) < 1e-12


@pytest.mark.parametrize("length", [0, 23])
@pytest.mark.parametrize("chunk_tokens", [1, 4, "auto"])
def test_cross_entropy_equals_torch(backend, length, chunk_tokens):
    problem = make_problem(length=length)
    student, expected = leaf(problem.student), leaf(problem.student)
    loss = cross_entropy(
        student, problem.labels, whole(problem), num_tokens=11, chunk_tokens=chunk_tokens, backend=backend
    )
    dense = torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(expected.hidden, expected.weight, expected.bias), problem.labels, reduction="sum"
    )
    (dense / 11).backward()
    loss.backward()
    torch.testing.assert_close(loss, dense / 11)
    for name in ("hidden", "weight", "bias"):
        torch.testing.assert_close(getattr(student, name).grad, getattr(expected, name).grad)


def test_cross_entropy_ignores_what_ignored_tokens_hold():
    problem = make_problem()
    clean = cross_entropy(problem.student, problem.labels, whole(problem), num_tokens=11)
    problem.student.hidden[problem.labels == IGNORE_INDEX] = float("nan")
    assert torch.equal(cross_entropy(problem.student, problem.labels, whole(problem), num_tokens=11), clean)


def test_weights_of_tokens_equal_the_reference(backend):
    """Of the sums over tokens: cross-entropy, token loss, the gate's objective and what is reported, not the span's."""
    for change in ({}, {"temperature": 2.0, "clip": "off"}, {"span_relation": "log", "coverage_target": 0.0}):
        problem, gate = make_problem(seed=6), make_gate()
        problem.token_weights = torch.rand(len(problem.labels), generator=torch.Generator().manual_seed(1)).double()
        config = CONFIG.replace(backend=backend, **change)
        output, gradients, _ = run_fused(problem, config, gate)
        assert_same(output, gradients, run_reference(problem, config, gate), 1e-10)
        student, whole_vocabulary = leaf(problem.student), whole(problem)
        loss = cross_entropy(
            student, problem.labels, whole_vocabulary, num_tokens=problem.num_tokens, chunk_tokens=3, backend=backend,
            token_weights=problem.token_weights,
        )  # fmt: skip
        torch.testing.assert_close(loss, output.sft, rtol=1e-12, atol=0)
        loss.backward()
        expected = run_reference(problem, config.replace(dac_kl=0.0, span=0.0, sft=1.0, clip="off"), None)[1]
        torch.testing.assert_close(student.weight.grad, expected["weight"], rtol=1e-10, atol=1e-14)
    with pytest.raises(ValueError, match="token_weights must have shape"):
        cross_entropy(student, problem.labels, whole_vocabulary, num_tokens=1, token_weights=torch.ones(2))
