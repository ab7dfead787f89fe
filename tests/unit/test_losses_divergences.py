"""Baseline divergences and the teacher of top classes, on every backend, against the dense reference."""

import itertools
from dataclasses import replace

import pytest
import torch

from megadistill.errors import ConfigError, DataError
from megadistill.losses import Head, LossConfig, TeacherTopK, distill_loss
from megadistill.losses.divergences import DIVERGENCES
from megadistill.parallel import VocabShard
from tests.support.backends import BACKENDS
from tests.support.objective import (
    TOP_K,
    assert_same,
    make_gate,
    make_problem,
    make_skews,
    run_fused,
    run_reference,
    with_top_k,
)

CONFIG = LossConfig(sft=0.7, dac_kl=1.3, span=2.0, top_k=TOP_K, chunk_tokens=5, skew=0.3, jensen_shannon_beta=0.3)
BASELINES = list(DIVERGENCES)
SKEWED = sorted(name for name in DIVERGENCES if CONFIG.replace(divergence=name).is_skewed)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", BASELINES)
def test_divergences_equal_the_reference(backend, divergence, temperature):
    """Without a gate, whatever `clip` is."""
    config = CONFIG.replace(divergence=divergence, temperature=temperature, backend=backend)
    output, gradients, _ = run_fused(make_problem(), config, None)
    assert_same(output, gradients, run_reference(make_problem(), config, None), 1e-10)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", SKEWED)
def test_every_token_has_its_skew(backend, divergence, temperature):
    """For a whole teacher and one of top classes; equal skews are the setting, unequal ones are not."""
    config = CONFIG.replace(divergence=divergence, temperature=temperature, backend=backend)
    plain = run_fused(make_problem(), config, None)[0]
    for problem in (make_problem(), with_top_k(make_problem(), 20, temperature)):
        output, gradients, _ = run_fused(make_skews(problem), config, None)
        assert_same(output, gradients, run_reference(make_skews(problem), config, None), 1e-10)
        assert abs(float(output.dac_kl - plain.dac_kl)) > 1e-3
    equal = replace(make_problem(), skews=torch.full((23,), config.skew, dtype=torch.float64))
    torch.testing.assert_close(run_fused(equal, config, None)[0].dac_kl, plain.dac_kl, rtol=1e-12, atol=0)


def test_skews_that_do_not_fit():
    with pytest.raises(ValueError, match="skews are for skewed divergences, not for loss.divergence=reverse_kl"):
        run_fused(make_skews(make_problem()), CONFIG.replace(divergence="reverse_kl"), None)
    wrong = replace(make_problem(), skews=torch.ones(3))
    with pytest.raises(ValueError, match="skews must have shape"):
        run_fused(wrong, CONFIG.replace(divergence="skewed_reverse_kl"), None)


@pytest.mark.parametrize("exponents", [(0.4, 0.0), (0.0, 0.4), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (1.3, 0.9)])
def test_alpha_beta_with_any_exponents(backend, exponents):
    """Where one is 0 its power is a log; nothing else changes."""
    alpha, beta = exponents
    config = CONFIG.replace(divergence="alpha_beta", ab_alpha=alpha, ab_beta=beta, backend=backend)
    output, gradients, _ = run_fused(make_problem(), config, None)
    assert_same(output, gradients, run_reference(make_problem(), config, None), 1e-10)


def test_alpha_beta_needs_an_exponent():
    with pytest.raises(ConfigError, match=r"loss.ab_alpha=0 and loss.ab_beta=0 leave no divergence"):
        LossConfig(divergence="alpha_beta", ab_alpha=0, ab_beta=0)


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("divergence", BASELINES)
def test_divergences_in_float32(backend, divergence, scale):
    problem = make_problem(seed=7, length=24, num_classes=300, scale=scale)
    config = CONFIG.replace(divergence=divergence, backend=backend)
    output, gradients, _ = run_fused(problem, config, None, dtype=torch.float32)
    # A logit of size 500 is itself known to 3e-5 only.
    assert_same(output, gradients, run_reference(problem, config, None), 1e-5 * scale**0.75)


def test_nearly_equal_models_keep_their_digits():
    """Where p and q agree to three digits, log(p/m) from a quotient would be wrong in the fourth."""
    problem = make_problem(seed=8, num_classes=300, scale=1e-3)
    bias = torch.zeros(300, dtype=torch.float64)
    problem = replace(
        problem,
        student=Head(problem.student.hidden, problem.student.weight, bias),
        teacher=Head(problem.teacher.hidden, problem.teacher.weight, bias),
    )
    for divergence in ("jensen_shannon", "reverse_kl"):
        config = CONFIG.replace(divergence=divergence, sft=0.0, span=0.0)
        _, gradients, _ = run_fused(problem, config, None, dtype=torch.float32)
        _, expected = run_reference(problem, config, None)
        error = (gradients["hidden"].double() - expected["hidden"]).abs().max() / expected["hidden"].abs().max()
        assert float(error) < 2e-3


@pytest.mark.parametrize(
    ("one", "limit", "other"),
    [
        ({"divergence": "skewed_forward_kl", "skew": 1e-9}, "forward_kl", {}),
        ({"divergence": "skewed_reverse_kl", "skew": 1e-9}, "reverse_kl", {}),
        ({"divergence": "dac_kl", "clip": "off"}, "forward_kl", {}),
        ({"divergence": "alpha_beta", "ab_alpha": 1.0, "ab_beta": 0.0}, "forward_kl", {}),
        ({"divergence": "alpha_beta", "ab_alpha": 0.0, "ab_beta": 1.0}, "reverse_kl", {}),
        ({"divergence": "alpha_beta", "ab_alpha": 0.4, "ab_beta": 1e-8}, "alpha_beta", {"ab_alpha": 0.4, "ab_beta": 0}),
        ({"divergence": "alpha_beta", "ab_alpha": 1e-8, "ab_beta": 0.4}, "alpha_beta", {"ab_alpha": 0, "ab_beta": 0.4}),
    ],
)
def test_limits(one, limit, other):
    problem = make_problem()
    first, _, _ = run_fused(problem, CONFIG.replace(**one), None)
    second, _, _ = run_fused(problem, CONFIG.replace(divergence=limit, **other), None)
    torch.testing.assert_close(first.dac_kl, second.dac_kl, rtol=1e-6, atol=0)


@pytest.mark.parametrize("divergence", BASELINES)
def test_divergences_vanish_between_equal_models(divergence):
    problem = make_problem()
    problem = replace(problem, student=problem.teacher)
    output, gradients, _ = run_fused(problem, CONFIG.replace(divergence=divergence, sft=0.0), None)
    assert abs(float(output.loss.detach())) < 1e-12
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) < 1e-12


@pytest.mark.parametrize("num_listed", [1, 5, 20, 53])
@pytest.mark.parametrize(
    ("clip", "remainder", "temperature"),
    list(itertools.product(["gate", "fixed", "off"], ["bucket", "renormalize"], [1.0, 2.0])),
)  # fmt: skip
def test_a_teacher_of_top_classes_equals_the_reference(backend, num_listed, clip, remainder, temperature):
    problem, gate = with_top_k(make_problem(), num_listed, temperature), make_gate()
    config = CONFIG.replace(clip=clip, remainder=remainder, temperature=temperature, backend=backend)
    output, gradients, _ = run_fused(problem, config, gate)
    assert_same(output, gradients, run_reference(problem, config, gate), 1e-10)


@pytest.mark.parametrize("num_listed", [1, 20])
@pytest.mark.parametrize("divergence", BASELINES)
def test_divergences_from_top_classes(divergence, num_listed):
    problem = with_top_k(make_problem(), num_listed)
    config = CONFIG.replace(divergence=divergence)
    output, gradients, _ = run_fused(problem, config, None)
    assert_same(output, gradients, run_reference(problem, config, None), 1e-10)


def test_all_classes_listed_is_the_dense_teacher():
    """For the plain KL the two kinds of teacher agree when nothing is left for the rest."""
    config = CONFIG.replace(clip="off")
    dense, dense_gradients, _ = run_fused(make_problem(), config, None)
    listed, gradients, _ = run_fused(with_top_k(make_problem(), 53), config, None)
    assert_same(
        listed, gradients, ({name: value.detach() for name, value in vars(dense).items()}, dense_gradients), 1e-10
    )


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_top_classes_in_float32(scale):
    problem = with_top_k(make_problem(seed=7, length=24, num_classes=300, scale=scale), 20)
    config, gate = CONFIG.replace(chunk_tokens="auto"), make_gate(spread=0.05)
    expected = run_reference(problem, config, gate)
    output, gradients, _ = run_fused(problem, config, gate.float(), dtype=torch.float32)
    students = {name: gradient for name, gradient in gradients.items() if not name.startswith("gate.")}
    assert_same(output, students, (expected[0], {name: expected[1][name] for name in students}), 1e-5 * scale**0.75)


def test_ignored_tokens_of_top_classes_may_hold_anything():
    problem = with_top_k(make_problem(), 5)
    expected = run_reference(problem, CONFIG, make_gate())
    is_ignored = problem.labels == -100
    problem.teacher.ids[is_ignored] = -7
    problem.teacher.log_probs[is_ignored] = float("nan")
    problem.student.hidden[is_ignored] = float("inf")
    output, gradients, _ = run_fused(problem, CONFIG, make_gate())
    assert_same(output, gradients, expected, 1e-10)


def test_top_classes_that_do_not_fit_are_refused():
    problem = with_top_k(make_problem(), 5)
    top, shard = problem.teacher, VocabShard(0, 53, 53)

    def call(teacher, **changes):
        config = CONFIG.replace(clip="off", **changes)
        return distill_loss(
            problem.student, teacher, problem.labels, problem.pair_mask, None, config, shard, num_tokens=1, num_pairs=1
        )

    with pytest.raises(ValueError, match=r"expected \[23, L\] twice"):
        call(TeacherTopK(top.ids[:4], top.log_probs[:4], top.log_tail[:4]))
    with pytest.raises(ValueError, match="log_tail of shape"):
        call(TeacherTopK(top.ids, top.log_probs, top.log_tail[:4]))
    with pytest.raises(ConfigError, match="temperature 1.0, and loss.temperature=2.0"):
        call(top, temperature=2.0)
    with pytest.raises(DataError, match="outside 0 to 52"):
        call(TeacherTopK(top.ids + 50, top.log_probs, top.log_tail))
    with pytest.raises(DataError, match="a class twice at one position"):
        call(TeacherTopK(top.ids * 0, top.log_probs, top.log_tail))
    for wrong in (top.log_probs - 5, top.log_probs.exp(), top.log_probs * float("nan")):
        with pytest.raises(DataError, match="add up to .* not to 1"):
            call(TeacherTopK(top.ids, wrong, top.log_tail))
    certain = TeacherTopK(top.ids, top.log_probs.log_softmax(-1), torch.full_like(top.log_tail, -torch.inf))
    with pytest.raises(DataError, match="reverse_kl is infinite"):
        call(certain, divergence="reverse_kl")
    with pytest.raises(DataError, match="alpha_beta is infinite"):
        call(certain, divergence="alpha_beta", ab_alpha=0)
    for divergence in BASELINES:
        if divergence != "reverse_kl":
            assert call(certain, divergence=divergence).loss.isfinite()


def test_top_classes_from_logits():
    problem = make_problem()
    logits = torch.nn.functional.linear(problem.teacher.hidden, problem.teacher.weight, problem.teacher.bias)
    top = TeacherTopK.from_logits(logits, 5, temperature=2.0)
    expected = with_top_k(problem, 5, 2.0).teacher
    assert torch.equal(top.ids.sort(-1)[0], expected.ids.sort(-1)[0])
    torch.testing.assert_close(top.log_tail, expected.log_tail)
    assert TeacherTopK.from_logits(logits.half(), 5).log_probs.dtype == torch.float32
