"""Precision: float32 and half-precision inputs, extreme logits, finite differences."""

from dataclasses import replace

import pytest
import torch

from megadistill.losses import Head, LossConfig, distill_loss
from megadistill.parallel import VocabShard
from tests.support.backends import BACKENDS, with_backends
from tests.support.objective import (
    TOP_K,
    Problem,
    assert_same,
    make_gate,
    make_problem,
    run_fused,
    run_reference,
)

CONFIG = LossConfig(sft=0.7, dac_kl=1.3, span=2.0, top_k=TOP_K, chunk_tokens=5)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


CLOSE = with_backends(
    [("gate", "bucket", 2.0), ("gate", "renormalize", 1.0)],
    ("gate", "fixed", "off"),
    ("bucket", "renormalize"),
    (1.0, 2.0),
)


@pytest.mark.parametrize(("backend", "clip", "remainder", "temperature"), CLOSE, indirect=["backend"])
def test_float32_is_close_to_float64(backend, clip, remainder, temperature):
    problem, gate = make_problem(seed=5, length=64, num_classes=500), make_gate()
    config = CONFIG.replace(clip=clip, remainder=remainder, temperature=temperature, backend=backend)
    expected = run_reference(problem, config, gate)
    output, gradients, _ = run_fused(problem, config, gate.float(), dtype=torch.float32)
    assert output.loss.dtype == torch.float32
    assert_same(output, gradients, expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    problem, gate = make_problem(seed=6), make_gate()
    rounded = [
        Head(*(part.to(dtype).double() for part in (head.hidden, head.weight, head.bias)))
        for head in (problem.student, problem.teacher)
    ]
    problem = replace(problem, student=rounded[0], teacher=rounded[1])
    values, expected = run_reference(problem, CONFIG, gate)
    output, gradients, _ = run_fused(problem, CONFIG, gate.float(), dtype=dtype)
    assert output.loss.dtype == output.kl_map.dtype == torch.float32
    assert gradients["hidden"].dtype == gradients["weight"].dtype == gradients["bias"].dtype == dtype
    gate_part = {name: gradient for name, gradient in gradients.items() if name.startswith("gate.")}
    assert_same(output, gate_part, (values, {name: expected[name] for name in gate_part}), 1e-5)
    for name in ("hidden", "weight", "bias"):  # rounded once, at the end
        error = (gradients[name].double() - expected[name]).abs() / expected[name].abs().clamp_min(1e-3)
        assert float(error.max()) < torch.finfo(dtype).eps


def test_autocast_changes_nothing():
    problem, gate = make_problem(), make_gate().float()
    plain, plain_gradients, _ = run_fused(problem, CONFIG, gate, dtype=torch.float32)
    plain_gradients = {name: gradient.clone() for name, gradient in plain_gradients.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, gradients, _ = run_fused(problem, CONFIG, gate, dtype=torch.float32)
    assert torch.equal(output.loss, plain.loss)
    assert all(torch.equal(gradients[name], plain_gradients[name]) for name in gradients)


@pytest.mark.parametrize("clip", ["gate", "fixed", "off"])
@pytest.mark.parametrize("remainder", ["bucket", "renormalize"])
@pytest.mark.parametrize(("scale", "offset"), [(1e-3, 0.0), (20.0, 0.0), (100.0, 0.0), (2.0, 1000.0), (2.0, -1000.0)])
def test_extreme_logits_stay_right_in_float32(backend, clip, remainder, scale, offset):
    """Far beyond where probabilities underflow: finite, and close to float64 as far as the logits themselves are."""
    problem = make_problem(seed=9, length=32, num_classes=200, scale=scale)
    problem = replace(
        problem,
        student=Head(problem.student.hidden, problem.student.weight, problem.student.bias + offset),
        teacher=Head(problem.teacher.hidden, problem.teacher.weight, problem.teacher.bias - offset),
    )
    gate, config = make_gate(spread=0.05), CONFIG.replace(clip=clip, remainder=remainder, backend=backend)
    exact, exact_gradients, _ = run_fused(problem, config, gate)
    exact_gradients = {name: gradient.clone() for name, gradient in exact_gradients.items()}
    output, gradients, _ = run_fused(problem, config, make_gate(spread=0.05).float(), dtype=torch.float32)
    # A logit of size x is only known to x * 2^-24, and DAC-KL's mask amplifies that by 1 / softness.
    tolerance = 1e-5 + 20 * (scale * 5 + abs(offset)) * 2.0**-24
    for name in ("loss", "sft", "dac_kl", "kept_mass"):
        actual, expected = float(getattr(output, name).detach()), float(getattr(exact, name).detach())
        assert abs(actual - expected) <= tolerance * max(1.0, abs(expected)), name
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        if not name.startswith("gate."):
            error = (gradient.double() - exact_gradients[name]).abs().max() / exact_gradients[name].abs().max()
            assert float(error) <= 10 * tolerance, name


OPEN = with_backends([(0.25, 1), (1e-4, 53)], (0.25, 0.01, 1e-4), (1, 53))


@pytest.mark.parametrize(("backend", "softness", "num_classes"), OPEN, indirect=["backend"])
def test_an_open_mask_is_the_plain_kl_in_float32(backend, num_classes, softness):
    """Nothing is clipped, so a log Rq of minus thousands must meet exactly nothing."""
    problem = make_problem(length=8, num_classes=num_classes, scale=0.01)
    config = LossConfig(sft=0.0, span=0.0, clip="fixed", lower=0.0, upper=1.0, softness=softness, backend=backend)
    opened = run_fused(problem, config, None, dtype=torch.float32)[0]
    plain = run_fused(problem, config.replace(clip="off"), None, dtype=torch.float32)[0]
    torch.testing.assert_close(opened.dac_kl, plain.dac_kl, rtol=1e-5, atol=1e-7)
    equal = run_fused(replace(problem, student=problem.teacher), config, None, dtype=torch.float32)[0]
    assert abs(float(equal.loss.detach())) < 1e-6


SCALES = [(scale, 0.0) for scale in (1e-3, 0.1, 1.0, 10.0, 100.0)]
OFFSETS = [(1.0, 1e3), (1.0, -1e3)]


@pytest.mark.parametrize("work", ["full", "ce+kl"])
@pytest.mark.parametrize(
    ("source", "scale", "offset"),
    [(source, *case) for source in ("logits", "biases") for case in SCALES + OFFSETS]
    + [("products", *case) for case in SCALES],
)
def test_float32_gradients_are_within_1e_5_of_float64(backend, source, scale, offset, work):
    """At every scale of logits, and with offsets as large as 1000. An offset that comes out of the products themselves
    is left out: float32 logits of size 1000 are known to 6e-5 only, before any loss sees them."""
    generator = torch.Generator().manual_seed(3)
    length, num_classes, width = 40, 500, 500 if source == "logits" else 32

    def head(sign: float) -> Head:
        hidden = torch.randn(length, width, generator=generator) * scale / (1 if source == "logits" else width**0.5)
        if source == "logits":  # exactly what float32 can hold
            return Head((hidden + sign * offset).double(), torch.eye(num_classes, dtype=torch.float64))
        bias = torch.randn(num_classes, generator=generator) + sign * offset if source == "biases" else None
        weight = torch.randn(num_classes, width, generator=generator)
        return Head(hidden.double(), weight.double(), None if bias is None else bias.double())

    labels = torch.randint(0, num_classes, (length,), generator=generator)
    pairs = torch.rand(length, generator=generator) < 0.5
    problem = Problem(head(1.0), head(-1.0), labels, pairs, length, int(pairs[:-1].sum()))
    config = LossConfig(top_k=TOP_K, backend=backend)
    if work == "ce+kl":
        config = config.replace(clip="off", span=0.0)
    gate = make_gate(spread=0.0)
    _, expected = run_reference(problem, config, gate)
    _, gradients, _ = run_fused(problem, config, gate.float(), dtype=torch.float32)
    for name in ("hidden", "weight"):
        error = (gradients[name].double() - expected[name]).abs().max() / expected[name].abs().max()
        assert float(error) < 1e-5, name


def test_clipped_student_mass_may_underflow(backend):
    """The bucket's log-ratio is exact although every clipped student probability is far below float32's range."""
    teacher = torch.tensor([[0.0, -1.0, -4.0, -4.0]], dtype=torch.float64)
    student = torch.tensor([[0.0, -1.0, -500.0, -600.0]], dtype=torch.float64)
    eye = torch.eye(4, dtype=torch.float64)
    config = LossConfig(sft=0.0, span=0.0, clip="fixed", lower=0.024, top_k=4, softness=0.002, backend=backend)
    for remainder in ("bucket", "renormalize"):
        results = []
        for dtype in (torch.float64, torch.float32):
            hidden = student.detach().to(dtype, copy=True).requires_grad_()
            output = distill_loss(
                Head(hidden, eye.to(dtype)), Head(teacher.to(dtype), eye.to(dtype)), torch.tensor([0]),
                torch.tensor([False]), None, config.replace(remainder=remainder), VocabShard(0, 4, 4),
                num_tokens=1, num_pairs=0,
            )  # fmt: skip
            output.loss.backward()
            results.append((output.dac_kl.double(), hidden.grad.double()))
        (exact, exact_gradient), (value, gradient) = results
        # A threshold is known to 1e-7 nats, which are 1e-4 of this softness.
        torch.testing.assert_close(value, exact, rtol=2e-4, atol=1e-6)
        torch.testing.assert_close(gradient, exact_gradient, rtol=1e-3, atol=1e-6)
        if remainder == "bucket":
            assert float(exact) > 10  # the clipped teacher mass of about 2 % times 500 nats
            assert float(gradient[0, 2]) < -0.01  # and it pulls the underflown class up


def test_directional_derivatives_equal_finite_differences():
    problem, config = make_problem(seed=11, length=12), CONFIG.replace(coverage_target=0.0)
    gate = make_gate()
    _, gradients, _ = run_fused(problem, config, gate)
    generator = torch.Generator().manual_seed(0)
    step = 1e-6
    for name in ("hidden", "weight", "bias"):
        source = getattr(problem.student, name)
        direction = torch.randn(source.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            moved = replace(problem, student=replace(problem.student, **{name: source + sign * step * direction}))
            values.append(float(run_fused(moved, config, make_gate())[0].loss.detach()))
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx(float((gradients[name] * direction).sum()), rel=1e-5), name


@pytest.mark.parametrize("upper", [1.0, 0.95])
@pytest.mark.parametrize("remainder", ["bucket", "truncate", "renormalize", "none"])
def test_gate_derivatives_equal_finite_differences_of_the_value(remainder, upper):
    """With guards off and minimize, the gate descends the loss itself.

    Its derivative is that of an exact quantile, and between two exact masses the quantile itself is not exact.
    """
    problem = make_problem(seed=12, length=12)
    config = CONFIG.replace(guards=False, remainder=remainder, upper=upper)
    gate = make_gate(guards=False, upper=upper)
    _, gradients, _ = run_fused(problem, config, gate)
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    step = 1e-6
    generator = torch.Generator().manual_seed(1)
    for name, parameter in gate.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * step * direction
            values.append(float(run_fused(problem, config, gate)[0].loss.detach()))
            with torch.no_grad():
                parameter -= sign * step * direction
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx(float((gradients[f"gate.{name}"] * direction).sum()), rel=5e-3, abs=1e-5), name
