"""The gate and the quantile function: bounds, starting point, exactness, and why the guards exist."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megadistill.errors import ConfigError
from megadistill.losses import Head, LossConfig, QuantileGate, distill_loss
from megadistill.losses.quantile import find_thresholds
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
    gate = make_gate(8, seed=seed, spread=spread, upper=0.98)
    lambda_l, lambda_u = gate(*top_and_tail(log_probs(seed, num_classes, scale), 8))
    lower, upper = torch.sigmoid(lambda_l), torch.sigmoid(lambda_u)
    assert (lower <= 0.1 + 1e-9).all() and (upper >= 0.9 - 1e-9).all()
    assert lambda_l.shape == lambda_u.shape == (6,)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), spread=st.sampled_from([0.0, 1.0, 10.0]))
def test_without_guards_lower_stays_below_upper(seed, spread):
    gate = make_gate(8, seed=seed, spread=spread, guards=False, upper=0.98)
    lambda_l, lambda_u = gate(*top_and_tail(log_probs(seed, 50, 2.0), 8))
    assert (lambda_l <= lambda_u).all()


@pytest.mark.parametrize("guards", [True, False])
@pytest.mark.parametrize(("lower", "upper"), [(0.02, 0.98), (0.001, 0.95)])
def test_every_token_starts_at_the_given_quantiles(guards, lower, upper):
    gate = QuantileGate(8, lower=lower, upper=upper, guards=guards).double()
    lambda_l, lambda_u = gate(*top_and_tail(log_probs(1, 50, 3.0), 8))
    torch.testing.assert_close(torch.sigmoid(lambda_l), torch.full_like(lambda_l, lower), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.sigmoid(lambda_u), torch.full_like(lambda_u, upper), rtol=1e-5, atol=0)


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
    assert [tuple(p.shape) for p in first.parameters()] == [(64, 9), (64,), (64, 64), (64,), (1, 64), (1,)]


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
    assert QuantileGate.from_config(LossConfig())(*top_and_tail(log_probs(0, 20, 1.0), 32))[1] is None


@pytest.mark.parametrize("start", [{"lower": 0.2}, {"upper": 0.8}, {"lower": 0.0}, {"upper": 1.5}])
def test_a_start_outside_the_bounds_is_refused(start):
    with pytest.raises(ConfigError, match="the gate starts at"):
        QuantileGate(8, **start)


def zipf(num_classes, power):
    return -power * torch.arange(1, num_classes + 1, dtype=torch.float64).log()


def flat_top(num_classes, num_equal, jitter=0.0):
    """Equal classes that hold 99 %, as at the choice points of open text; the rest holds 1 %."""
    probs = torch.full((num_classes,), 0.01 / (num_classes - num_equal), dtype=torch.float64)
    probs[:num_equal] = 0.99 / num_equal
    noise = torch.randn(num_equal, generator=torch.Generator().manual_seed(num_equal), dtype=torch.float64)
    probs[:num_equal] *= (jitter * noise).exp()
    return probs.log()


def confident(num_classes, largest):
    others = zipf(num_classes - 1, 1.2).log_softmax(-1) + math.log(1 - largest)
    return torch.cat([torch.tensor([math.log(largest)], dtype=torch.float64), others])


def rows(num_classes):
    """Distributions that language models give."""
    normal = log_probs(0, num_classes, 1.0, length=1)[0]
    yield from (zipf(num_classes, power) for power in (1.0, 1.2, 1.5, 2.0))
    yield from (spread * normal for spread in (0.1, 1.0, 3.0, 6.0))
    yield from (flat_top(num_classes, n, jitter) for n in (2, 4, 6, 8, 12, 25, 60) for jitter in (0.0, 0.1))
    yield from (confident(num_classes, largest) for largest in (0.6, 0.9, 0.98, 0.9999))


def thresholds(logits, lower, upper, softness=0.25):
    """(theta_l, theta_u, log p without the top class) of one row."""
    log_p = logits.log_softmax(-1)
    others = torch.cat([log_p[: log_p.argmax()], log_p[log_p.argmax() + 1 :]])

    def masses_at(below, above, is_wide):
        parts = [torch.sigmoid((node - others) / softness) @ others.exp() for node in below[0]]
        parts += [torch.sigmoid((others - node) / softness) @ others.exp() for node in above[0]]
        return torch.stack(parts).unsqueeze(0)

    found = find_thresholds(
        masses_at, *(torch.tensor([bound], dtype=torch.float64).logit() for bound in (lower, upper)),
        log_top=log_p.max().view(1), log_beside=others.logsumexp(0).view(1), softness=softness,
        num_classes=len(log_p),
    )  # fmt: skip
    return found.theta_l, found.theta_u, others


@pytest.mark.parametrize("num_classes", [200, 32000, 262144])
@pytest.mark.parametrize(("lower", "upper"), [(0.001, 0.9), (0.02, 0.98), (0.1, 0.95), (0.3, 0.9999)])
def test_a_quantile_is_the_mass_that_its_edge_cuts(num_classes, lower, upper):
    """Below within 0.002, or all there is beside the top class; above no more than asked for."""
    for logits in rows(num_classes):
        theta_l, theta_u, others = thresholds(logits, lower, upper)
        below = float(torch.sigmoid((theta_l - others) / 0.25) @ others.exp())
        above = float(torch.sigmoid((others - theta_u) / 0.25) @ others.exp())
        assert below == pytest.approx(min(lower, float(others.exp().sum())), abs=0.002)
        assert above <= 1 - upper + 1e-6


@pytest.mark.parametrize("jitter", [0.0, 0.1])
@pytest.mark.parametrize("num_equal", [2, 4, 8, 25, 100])
def test_an_upper_edge_leaves_ties_whole(num_equal, jitter):
    for upper in (0.9, 0.95, 0.98):
        _, theta_u, others = thresholds(flat_top(32000, num_equal, jitter), 0.02, upper)
        assert float(torch.sigmoid((others - theta_u) / 0.25) @ others.exp()) < 0.003


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    points=st.tuples(st.floats(1e-5, 0.999), st.floats(1e-5, 0.999)),
    scale=st.sampled_from([0.01, 2.0, 100.0]),
)
def test_thresholds_rise_with_their_quantiles(seed, points, scale):
    row = log_probs(seed, 60, scale, length=1)[0]
    low, high = (thresholds(row, point, point) for point in sorted(points))
    assert low[0] <= high[0] + 1e-9 and low[1] <= high[1] + 1e-9
    assert low[0].isfinite() and low[1] >= low[0]


@pytest.mark.parametrize("softness", [1e-4, 0.01, 0.05, 0.25, 2.0])
def test_any_softness_finds_its_threshold(softness):
    theta_l, _, others = thresholds(zipf(2000, 1.2), 0.1, 0.9, softness)
    assert float(torch.sigmoid((theta_l - others) / softness) @ others.exp()) == pytest.approx(0.1, abs=0.002)


def test_infinite_quantiles_are_open_ends():
    theta_l, theta_u, _ = thresholds(zipf(60, 1.0), 0.0, 1.0)
    assert float(theta_l) == -1e4 and float(theta_u) == 1e4


def clip_rows(logits, config, gate=None):
    """The objective of a student equal to its teacher, for rows of logits."""
    head = Head(torch.eye(len(logits), dtype=torch.float64), logits.T.contiguous())
    no_pairs = torch.zeros(len(logits), dtype=torch.bool)
    return distill_loss(
        head, head, torch.zeros(len(logits), dtype=torch.int64), no_pairs, gate, config,
        VocabShard(0, logits.shape[1], logits.shape[1]), num_tokens=len(logits), num_pairs=0,
    )  # fmt: skip


@pytest.mark.parametrize("lower", [0.02, 0.1])
def test_the_kept_mass_is_what_the_quantile_leaves(lower):
    """Through the whole objective, in float64, without an upper edge."""
    logits = torch.stack(list(rows(9000)))
    beside = 1 - logits.log_softmax(-1).exp().amax(-1)
    output = clip_rows(logits, LossConfig(sft=0, span=0, clip="fixed", lower=lower))
    assert float(output.kept_mass) == pytest.approx(float(1 - beside.clamp(max=lower).mean()), abs=0.001)


def test_the_metrics_of_the_mask_tell_confident_rows_of_one_class():
    """What kept mass hides: a row of 0.9999 loses all but its first class, and a flat one keeps its 25."""
    logits = torch.stack([confident(400, 0.9999), flat_top(400, 25)])
    config = LossConfig(sft=0, span=0, clip="fixed", lower=0.01)
    both, sure, open_ = clip_rows(logits, config), clip_rows(logits[:1], config), clip_rows(logits[1:], config)
    assert float(sure.classes) == pytest.approx(1.0, abs=0.01) and float(sure.few_classes) == 1
    assert float(open_.classes) == pytest.approx(25.0, abs=0.5) and float(open_.few_classes) == 0
    assert float(both.few_classes) == 0.5 and float(both.kept_mass) > 0.99
    torch.testing.assert_close(both.classes, (sure.classes + open_.classes) / 2)


def test_entropy_clips_open_rows_and_leaves_confident_ones_their_second_classes():
    logits = torch.stack([confident(400, 0.98), torch.zeros(400, dtype=torch.float64)])
    by_entropy = LossConfig(sft=0, span=0, clip="entropy", lower=0.3)
    sure, even = (clip_rows(logits[i : i + 1], by_entropy) for i in (0, 1))
    assert float(even.mean_lower) == pytest.approx(0.3) and float(even.kept_mass) == pytest.approx(0.7, abs=0.002)
    entropy = -(logits[0].exp() * logits[0]).sum()
    assert 0 < float(sure.mean_lower) < 0.3 * 1.1 * float(entropy) / math.log(400)
    constant = clip_rows(logits[:1], LossConfig(sft=0, span=0, clip="fixed", lower=0.3))
    assert float(sure.classes) > 3 and float(constant.classes) < 1.01


def test_a_clip_removes_planted_noise():
    """20 % of the mass spread over classes that the clean teacher does not use: truncation drops nine tenths of it."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.zeros(64, 1000, dtype=torch.float64)
    clean[:, :20] = torch.rand(64, 20, generator=generator, dtype=torch.float64)
    clean = 0.8 * clean / clean.sum(-1, keepdim=True)
    noise = torch.rand(64, 980, generator=generator, dtype=torch.float64)
    noisy = clean.clone()
    noisy[:, 20:] = 0.2 * noise / noise.sum(-1, keepdim=True)
    hidden = torch.zeros(64, 1000, dtype=torch.float64, requires_grad=True)  # logits of a student that knows nothing
    eye = torch.eye(1000, dtype=torch.float64)
    left = {}
    for remainder in ("bucket", "truncate"):
        hidden.grad = None
        config = LossConfig(sft=0, span=0, clip="fixed", lower=0.2, remainder=remainder)
        distill_loss(
            Head(hidden, eye), Head(noisy.log(), eye), torch.zeros(64, dtype=torch.int64),
            torch.zeros(64, dtype=torch.bool), None, config, VocabShard(0, 1000, 1000), num_tokens=64, num_pairs=0,
        ).loss.backward()  # fmt: skip
        # The derivative is q - g: g is what the student is told to become.
        left[remainder] = float((1 / 1000 - 64 * hidden.grad)[:, 20:].sum() / 64)
    assert left["bucket"] == pytest.approx(0.2, abs=0.01)  # the bucket asks for the same mass
    assert left["truncate"] < 0.02


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


def test_a_minimizing_gate_opens_where_what_is_dropped_is_shared_out():
    """With a bucket dropping a class never raises the loss; with ``truncate`` dL/dm has either sign."""
    kept, values = train_gate(LossConfig(sft=0.0, span=0.0, guards=False, remainder="truncate"), steps=60)
    assert kept[-1] > 0.999 > kept[0] and values[-1] < values[0]


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
    output, gradients, _ = run_fused(problem, LossConfig(top_k=8, upper=0.95), gate)
    bound = 1 / (1 + math.exp(3.0))
    fixed, _, _ = run_fused(problem, LossConfig(top_k=8, clip="fixed", lower=bound, upper=1 - bound), None)
    torch.testing.assert_close(output.loss, fixed.loss)
    assert gradients["gate.bounds"].all() and not gradients["gate.unused"].any()
    with pytest.raises(ConfigError, match="the gate gives an upper quantile, and loss.upper=1 asks for none"):
        run_fused(problem, LossConfig(top_k=8), gate)
    with pytest.raises(ConfigError, match="the gate gives no upper quantile, and loss.upper=0.95 asks for one"):
        run_fused(problem, LossConfig(top_k=8, upper=0.95), make_gate())


def learned_quantiles(coverage):
    """l of confident and of open rows after the default gate has learned at its default rate."""
    logits = torch.cat([torch.stack([confident(200, 0.98)] * 8), log_probs(4, 200, 0.5, length=8)])
    student = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    config = LossConfig(sft=0, span=0, coverage=coverage)
    gate = QuantileGate.from_config(config)
    optimizer = torch.optim.Adam(gate.parameters(), lr=1e-3)
    eye, shard = torch.eye(200, dtype=torch.float64), VocabShard(0, 200, 200)
    for _ in range(120):
        optimizer.zero_grad()
        output = distill_loss(
            Head(student, eye), Head(logits, eye), torch.zeros(16, dtype=torch.int64),
            torch.zeros(16, dtype=torch.bool), gate, config, shard, num_tokens=16, num_pairs=0,
        )  # fmt: skip
        output.loss.backward()
        optimizer.step()
    with torch.no_grad():
        lower = torch.sigmoid(gate(*top_and_tail(logits.log_softmax(-1), 32))[0])
    return float(lower[:8].mean()), float(lower[8:].mean()), float(output.few_classes)


def test_relative_coverage_leaves_confident_rows_what_lies_beside_their_first_class():
    sure, even, few = learned_quantiles("absolute")
    assert sure > 0.02 and even > 0.02 and few == 0.5  # of confident rows, all is cut that there is
    sure, even, few = learned_quantiles("relative")
    assert sure < 0.05 * 0.02 and even > 2 * sure and few == 0
