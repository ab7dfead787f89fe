"""gate_objective=student against dense float64 autograd: the virtual step on any layout, and the gate's gradient."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megadistill.errors import ConfigError
from megadistill.losses import IGNORE_INDEX, Head, LossConfig, virtual_step
from megadistill.parallel import VocabShard
from tests.support.backends import BACKENDS
from tests.support.objective import (
    MASKS,
    TOP_K,
    assert_same,
    make_gate,
    make_problem,
    make_rows,
    run_fused,
    run_reference,
    with_top_k,
)
from tests.support.spawn import run_ranks

CONFIG = LossConfig(sft=0.7, dac_kl=1.3, span=2.0, top_k=TOP_K, chunk_tokens=5, gate_objective="student")


def references_loss(head, labels):
    is_valid = labels != IGNORE_INDEX
    return F.cross_entropy(F.linear(head.hidden[is_valid], head.weight, head.bias), labels[is_valid], reduction="sum")


def dense_step(student, labels, rate=None):
    """The head after the step, with the whole vocabulary and all tokens in one process."""
    parts = [part.clone().requires_grad_() for part in (student.weight, student.bias) if part is not None]
    gradients = torch.autograd.grad(references_loss(Head(student.hidden, *parts), labels), parts)
    hidden = student.hidden[labels != IGNORE_INDEX]
    rate = rate or 1 / float(hidden.square().sum() + len(hidden) * (student.bias is not None))
    return Head(student.hidden, *(part.detach() - rate * of for part, of in zip(parts, gradients, strict=True)))


def problem_ahead(seed=0, rate=None):
    """A problem whose student has looked ahead on other tokens than the problem's own, and these."""
    problem, other = make_problem(seed), make_problem(seed + 50, length=31)
    references = Head(other.student.hidden, problem.student.weight, problem.student.bias)
    stepped = dense_step(references, other.labels, rate)
    problem.ahead = Head(problem.student.hidden, stepped.weight, stepped.bias)
    return problem, references, other.labels


def check(problem, config, gate, shard):
    output, gradients, _ = run_fused(problem, config, gate, shard=shard)
    assert_same(output, gradients, run_reference(problem, config, gate, shard), 1e-10)
    assert any(gradient.abs().max() > 1e-6 for name, gradient in gradients.items() if name.startswith("gate."))


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4])
def test_the_gates_gradient_equals_the_dense_one(tp_size):
    def body(rank):
        for mask in MASKS[:8]:
            problem, *_ = problem_ahead()
            shard = VocabShard.split(problem.num_classes, tp_size, rank, dist.group.WORLD)
            gate = make_gate(upper=mask["upper"])
            check(problem, CONFIG.replace(**mask), gate, shard)
            check(with_top_k(problem, 50, mask["temperature"]), CONFIG.replace(**mask), gate, shard)

    run_ranks(body, tp_size)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_equals_the_dense_one(backend):
    problem, *_ = problem_ahead(1)
    shard = VocabShard(0, problem.num_classes, problem.num_classes)
    for mask in MASKS[0], MASKS[5]:
        check(problem, CONFIG.replace(backend=backend, **mask), make_gate(upper=mask["upper"]), shard)


@pytest.mark.parametrize("backend", BACKENDS[2:])  # compiling would take each rank a minute for the same exchange
def test_triton_equals_the_dense_one_across_shards(backend):
    def body(rank):
        problem, *_ = problem_ahead(1)
        shard = VocabShard.split(problem.num_classes, 3, rank, dist.group.WORLD)
        check(problem, CONFIG.replace(backend=backend, **MASKS[1]), make_gate(upper=MASKS[1]["upper"]), shard)

    run_ranks(body, 3, timeout_s=400.0)


@pytest.mark.parametrize(("tp_size", "dp_size"), [(1, 1), (3, 1), (4, 1), (1, 3), (2, 2)])
def test_the_virtual_step_is_the_same_on_every_layout(tp_size, dp_size):
    """Data-parallel ranks have different numbers of references; with three, one has none."""
    ends = {1: [0, 23], 2: [0, 15, 23], 3: [0, 15, 23, 23]}[dp_size]

    def body(rank):
        tp_groups = [dist.new_group(list(range(d * tp_size, (d + 1) * tp_size))) for d in range(dp_size)]
        dp_groups = [dist.new_group(list(range(t, tp_size * dp_size, tp_size))) for t in range(tp_size)]
        tp_rank, dp_rank = rank % tp_size, rank // tp_size
        own = slice(ends[dp_rank], ends[dp_rank + 1])
        for seed, has_bias in itertools.product((0, 1), (True, False)):
            problem = make_problem(seed)
            whole = problem.student if has_bias else Head(problem.student.hidden, problem.student.weight)
            expected = dense_step(whole, problem.labels)
            shard = VocabShard.split(problem.num_classes, tp_size, tp_rank, tp_groups[dp_rank])
            classes = slice(shard.start, shard.stop)
            bias = None if whole.bias is None else whole.bias[classes]
            local = Head(whole.hidden[own], whole.weight[classes], bias)
            stepped = virtual_step(local, problem.labels[own], shard, dp_groups[tp_rank], chunk_tokens=4)
            torch.testing.assert_close(stepped.weight, expected.weight[classes], rtol=1e-10, atol=1e-12)
            if has_bias:
                torch.testing.assert_close(stepped.bias, expected.bias[classes], rtol=1e-10, atol=1e-12)

    run_ranks(body, tp_size * dp_size)


def test_it_goes_together_with_every_other_term():
    """Spans as written, the policy gradient, weights of tokens: the gate's gradient is the same function."""
    problem, *_ = problem_ahead(3)
    problem = make_rows(problem, 0.2)
    problem.token_weights = torch.linspace(0.5, 2, len(problem.labels), dtype=torch.float64)
    shard = VocabShard(0, problem.num_classes, problem.num_classes)
    for more in {"span_relation": "log", "policy": 1.7, "policy_reward": "return"}, {"policy": 0.3}:
        check(problem, CONFIG.replace(**more), make_gate(), shard)


def test_without_references_the_head_stays_and_the_gate_does_not_learn():
    problem = make_problem()
    shard = VocabShard(0, problem.num_classes, problem.num_classes)
    stepped = virtual_step(problem.student, torch.full_like(problem.labels, IGNORE_INDEX), shard, None)
    assert torch.equal(stepped.weight, problem.student.weight) and torch.equal(stepped.bias, problem.student.bias)
    problem.ahead = problem.student
    _, gradients, _ = run_fused(problem, CONFIG, make_gate())
    assert all(not gradients[name].any() for name in gradients if name.startswith("gate."))


def test_the_step_is_needed():
    with pytest.raises(ConfigError, match="gate_objective=student needs"):
        run_fused(make_problem(), CONFIG, make_gate())


def test_the_gates_gradient_is_that_of_the_references_after_a_step_along_dac_kl():
    """The bilevel objective, to first order: by the gate, d NLL(W - rate dDAC-KL/dW) for rate -> 0."""
    rate, change = 1e-4, 1e-3
    problem, references, labels = problem_ahead(2, rate)
    gate, config = make_gate(), CONFIG.replace(sft=0.0, span=0.0, dac_kl=1.0, chunk_tokens=100)
    _, gradients, _ = run_fused(problem, config, gate)
    actual = float(gradients["gate.layers.4.bias"])

    def slope():
        """Derivative of the references' loss by the rate."""
        _, of, _ = run_fused(problem, config.replace(gate_objective="frozen"), gate)
        losses = [
            float(references_loss(Head(references.hidden, references.weight - r * of["weight"],
                                       references.bias - r * of["bias"]), labels))
            for r in (rate, -rate)
        ]  # fmt: skip
        return (losses[0] - losses[1]) / 2

    bias, slopes = gate.layers[4].bias, []
    for sign in (1, -2):
        with torch.no_grad():
            bias += sign * change
        slopes.append(slope())
    expected = (slopes[0] - slopes[1]) / (2 * change)
    assert actual == pytest.approx(expected, rel=0.02) and actual != 0
