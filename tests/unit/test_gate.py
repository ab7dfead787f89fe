"""The gate and the quantile function: bounds, starting point, exactness, and why the guards exist."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megadistill.errors import ConfigError
from megadistill.losses import Head, LossConfig, QuantileGate, distill_loss
from megadistill.losses.quantile_gate import QuantileFunction, constant_quantiles
from megadistill.losses.reference import quantile_thresholds
from megadistill.parallel import VocabShard
from tests.support.objective import make_gate, make_problem, run_fused


def top_and_tail(log_probs, top_k):
    top, index = log_probs.topk(min(top_k, log_probs.shape[-1]), -1)
    return top, log_probs.scatter(-1, index, -math.inf).logsumexp(-1)


def log_probs(seed, num_classes, scale, length=6):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(length, num_classes, generator=generator, dtype=torch.float64) * scale).log_softmax(-1)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.0, 0.1, 1.0, 10.0, 100.0]),
    num_classes=st.integers(1, 100),
    scale=st.sampled_from([0.001, 1.0, 5.0, 100.0]),
)
def test_the_bounds_hold_by_construction(seed, spread, num_classes, scale):
    gate = make_gate(8, seed=seed, spread=spread)
    lambda_l, lambda_u = gate(*top_and_tail(log_probs(seed, num_classes, scale), 8))
    lower, upper = torch.sigmoid(lambda_l), torch.sigmoid(lambda_u)
    assert (lower <= 0.1 + 1e-9).all() and (upper >= 0.9 - 1e-9).all()
    assert lambda_l.shape == lambda_u.shape == (6,)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), spread=st.sampled_from([0.0, 1.0, 10.0]))
def test_without_guards_lower_stays_below_upper(seed, spread):
    gate = make_gate(8, seed=seed, spread=spread, guards=False)
    lambda_l, lambda_u = gate(*top_and_tail(log_probs(seed, 50, 2.0), 8))
    assert (lambda_l <= lambda_u).all()


@pytest.mark.parametrize("guards", [True, False])
@pytest.mark.parametrize(("lower", "upper"), [(0.02, 0.98), (0.001, 0.95)])
def test_every_token_starts_at_the_given_quantiles(guards, lower, upper):
    gate = QuantileGate(8, lower=lower, upper=upper, guards=guards).double()
    lambda_l, lambda_u = gate(*top_and_tail(log_probs(1, 50, 3.0), 8))
    torch.testing.assert_close(torch.sigmoid(lambda_l), torch.full_like(lambda_l, lower), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.sigmoid(lambda_u), torch.full_like(lambda_u, upper), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("num_classes", "scale"), [(2000, 2.0), (2000, 5.0), (512, 3.0), (32000, 5.0)])
def test_a_new_gate_keeps_about_97_percent_of_the_mass(num_classes, scale):
    kept = []
    for token in log_probs(2, num_classes, scale, length=24):
        head = Head(torch.ones(1, 1, dtype=torch.float64), token.unsqueeze(-1))
        output = distill_loss(
            head, head, torch.tensor([0]), torch.tensor([False]), QuantileGate(32).double(),
            LossConfig(sft=0.0, span=0.0), VocabShard(0, num_classes, num_classes), num_tokens=1, num_pairs=0,
        )  # fmt: skip
        kept.append(float(output.kept_mass))
    assert sum(kept) / len(kept) == pytest.approx(0.97, abs=0.025)


def test_the_start_depends_on_nothing_but_the_seed():
    torch.manual_seed(1)
    first = QuantileGate(8)
    torch.manual_seed(2)
    torch.set_default_dtype(torch.float64)
    try:
        second = QuantileGate(8).float()
    finally:
        torch.set_default_dtype(torch.float32)
    other = QuantileGate(8, seed=1)
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))
    assert [tuple(p.shape) for p in first.parameters()] == [(64, 9), (64,), (64, 64), (64,), (2, 64), (2,)]


def test_making_a_gate_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    QuantileGate(8)
    assert torch.equal(torch.rand(1), expected)


def test_from_config_follows_the_config():
    config = LossConfig(top_k=5, lower=0.01, upper=0.95, lower_max=0.2, upper_min=0.8)
    gate = QuantileGate.from_config(config)
    lambda_l, lambda_u = gate(*(part.float() for part in top_and_tail(log_probs(0, 20, 1.0), 5)))
    torch.testing.assert_close(torch.sigmoid(lambda_l).mean(), torch.tensor(0.01), rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.sigmoid(lambda_u).mean(), torch.tensor(0.95), rtol=1e-4, atol=0)
    assert QuantileGate.from_config(LossConfig(guards=False, lower=0.2, upper=0.7)).guards is False


@pytest.mark.parametrize("start", [{"lower": 0.2}, {"upper": 0.8}, {"lower": 0.0}, {"upper": 1.0}])
def test_a_start_outside_the_bounds_is_refused(start):
    with pytest.raises(ConfigError, match="the gate starts at"):
        QuantileGate(8, **start)


quantile_logits = st.floats(-30, 30)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    num_classes=st.integers(1, 100),
    scale=st.sampled_from([0.5, 2.0, 5.0]),
    point=quantile_logits,
    kind=st.sampled_from(["mass", "rank"]),
)
def test_the_quantile_function_equals_the_reference(seed, num_classes, scale, point, kind):
    top, tail = top_and_tail(log_probs(seed, num_classes, scale), 8)
    theta = QuantileFunction(top, tail, kind, num_classes)(torch.full_like(tail, point))
    expected = quantile_thresholds(top, tail, torch.full_like(tail, point), None if kind == "mass" else num_classes)
    torch.testing.assert_close(theta, expected, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    points=st.tuples(quantile_logits, quantile_logits),
    scale=st.sampled_from([0.01, 2.0, 100.0]),
)
def test_the_quantile_function_rises(seed, points, scale):
    top, tail = top_and_tail(log_probs(seed, 60, scale), 8)
    quantile = QuantileFunction(top, tail, "mass", 60)
    low, high = (quantile(torch.full_like(tail, point)) for point in sorted(points))
    assert (low <= high + 1e-9).all() and low.isfinite().all()


def test_the_quantile_function_passes_through_its_knots_and_has_slope_one_outside():
    probs = torch.tensor([[0.5, 0.3, 0.1]], dtype=torch.float64)
    quantile = QuantileFunction(probs.log(), torch.tensor([0.1], dtype=torch.float64).log(), "mass", 10)
    # Mass below, own half included, for each class: 0.75, 0.35, 0.15.
    knots = torch.tensor([0.75, 0.35, 0.15], dtype=torch.float64).logit()
    for knot, prob in zip(knots, probs[0], strict=True):
        torch.testing.assert_close(quantile(knot.view(1)), prob.log().view(1))
    torch.testing.assert_close(quantile(knots[:1] + 2.5), probs[:, 0].log() + 2.5)
    torch.testing.assert_close(quantile(knots[2:] - 2.5), probs[:, 2].log() - 2.5)


def test_infinite_quantiles_are_open_ends():
    top, tail = top_and_tail(log_probs(0, 60, 2.0), 8)
    quantile = QuantileFunction(top, tail, "mass", 60)
    low, high = (quantile(bound) for bound in constant_quantiles(0.0, 1.0, tail))
    assert torch.isneginf(low).all() and torch.isposinf(high).all()


def test_a_confident_teacher_keeps_its_knots_apart():
    """Beside a first class of probability 1 - 1e-90, mass is far below round-off; in the log domain it is not."""
    logits = torch.tensor([[0.0, -200.0, -210.0, -230.0]], dtype=torch.float64)
    quantile = QuantileFunction(*top_and_tail(logits.log_softmax(-1), 4), "mass", 4)
    assert (quantile.knots_CK.diff() > 5).all()
    # In float32 inputs too: they carry log-probabilities, not probabilities.
    single = QuantileFunction(*(part.float() for part in top_and_tail(logits.log_softmax(-1), 4)), "mass", 4)
    torch.testing.assert_close(single.knots_CK, quantile.knots_CK, rtol=1e-6, atol=1e-6)


def train_gate(config, steps=100):
    """Kept mass after every step of Adam on the gate alone, at a fixed student that has learnt something."""
    problem = make_problem(seed=21, length=48, num_classes=200, scale=3.0, ignored=0.0)
    noise = torch.randn(problem.teacher.hidden.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    problem.student = Head(problem.teacher.hidden + 0.4 * noise, problem.teacher.weight, problem.student.bias)
    gate = QuantileGate.from_config(config)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.01)
    kept, values = [], []
    for _ in range(steps):
        output, _, _ = run_fused(problem, config, gate, dtype=torch.float32)
        optimizer.step()
        kept.append(float(output.kept_mass))
        values.append(float(output.dac_kl))
    return kept, values


def test_the_gate_collapses_without_guards_and_not_with_them():
    """Minimizing alone, every class is worth dropping (dL/dm >= 0): the mask closes round the first class."""
    kept, values = train_gate(LossConfig(sft=0.0, span=0.0, guards=False))
    assert kept[0] > 0.93
    assert kept[-1] < 0.5 and values[-1] < 0.5 * values[0]
    guarded, _ = train_gate(LossConfig(sft=0.0, span=0.0))
    assert min(guarded) > 0.9 and max(guarded) < 0.999


def test_a_maximizing_gate_opens():
    kept, values = train_gate(LossConfig(sft=0.0, span=0.0, gate_objective="maximize"))
    assert kept[-1] > 0.995 and values[-1] > values[0]


def test_maximize_turns_the_gates_gradient_round_and_leaves_the_students():
    problem, gate = make_problem(), make_gate()
    config = LossConfig(top_k=8, guards=False)
    results = []
    for objective in ("minimize", "maximize"):
        output, gradients, _ = run_fused(problem, LossConfig(top_k=8, guards=False, gate_objective=objective), gate)
        results.append((output.loss.detach(), {name: gradient.clone() for name, gradient in gradients.items()}))
    assert config.gate_objective == "minimize" and torch.equal(results[0][0], results[1][0])
    for name in results[0][1]:
        sign = -1 if name.startswith("gate.") else 1
        torch.testing.assert_close(results[0][1][name], sign * results[1][1][name])


def test_a_frozen_gate_clips_and_does_not_learn():
    problem, gate = make_problem(), make_gate()
    learning, _, _ = run_fused(problem, LossConfig(top_k=8), gate)
    frozen, gradients, _ = run_fused(problem, LossConfig(top_k=8, gate_objective="frozen"), gate)
    assert torch.equal(frozen.loss, learning.loss)
    assert all(gradient is None for name, gradient in gradients.items() if name.startswith("gate."))


def test_the_coverage_penalty_is_not_in_the_reported_loss():
    problem, gate = make_problem(), make_gate()
    with_guard, strong, _ = run_fused(problem, LossConfig(top_k=8, coverage_target=0.0), gate)
    strong = {name: gradient.clone() for name, gradient in strong.items()}
    without, weak, _ = run_fused(problem, LossConfig(top_k=8, coverage_weight=0.0), gate)
    assert torch.equal(with_guard.loss, without.loss)
    assert torch.equal(strong["hidden"], weak["hidden"])
    assert not torch.allclose(strong["gate.layers.4.bias"], weak["gate.layers.4.bias"])


def test_a_gate_of_ones_own_works():
    """Anything with the call signature is a gate."""

    class Constant(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bounds = torch.nn.Parameter(torch.tensor([-3.0, 3.0], dtype=torch.float64))
            self.unused = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))

        def forward(self, sorted_log_probs, log_tail):
            return self.bounds[0].expand_as(log_tail), self.bounds[1].expand_as(log_tail)

    gate, problem = Constant(), make_problem()
    output, gradients, _ = run_fused(problem, LossConfig(top_k=8), gate)
    bound = 1 / (1 + math.exp(3.0))
    fixed, _, _ = run_fused(problem, LossConfig(top_k=8, clip="fixed", lower=bound, upper=1 - bound), None)
    torch.testing.assert_close(output.loss, fixed.loss)
    assert gradients["gate.bounds"].any() and not gradients["gate.unused"].any()
