"""What the losses promise beside their values: graphs, costs, edge cases, errors."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megadistill.errors import ConfigError, DataError
from megadistill.losses import (
    IGNORE_INDEX,
    METRIC_NAMES,
    Head,
    LossConfig,
    QuantileGate,
    cross_entropy,
    distill_loss,
)
from megadistill.parallel import VocabShard
from megadistill.parallel.output_head import OutputHead
from tests.support.objective import (
    TOP_K,
    Problem,
    assert_same,
    leaf,
    make_gate,
    make_problem,
    run_fused,
    run_reference,
)

CONFIG = LossConfig(sft=0.7, dac_kl=1.3, span=2.0, top_k=TOP_K, chunk_tokens=5)


def whole(problem: Problem) -> VocabShard:
    return VocabShard(0, problem.num_classes, problem.num_classes)


def test_the_teacher_gets_no_gradient():
    _, _, teacher = run_fused(make_problem(), CONFIG, make_gate())
    assert teacher.hidden.grad is None and teacher.weight.grad is None and teacher.bias.grad is None


def test_nothing_but_the_loss_carries_a_graph():
    output, _, _ = run_fused(make_problem(), CONFIG, make_gate())
    assert output.loss.requires_grad
    others = [name for name in vars(output) if name != "loss"]
    assert len(others) == 12 and not any(getattr(output, name).requires_grad for name in others)


@pytest.mark.parametrize("clip", ["gate", "fixed", "off"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_ignored_tokens_may_hold_anything(clip, bad):
    problem, gate, config = make_problem(), make_gate(), CONFIG.replace(clip=clip)
    expected = run_reference(problem, config, gate)
    is_ignored = problem.labels == IGNORE_INDEX
    assert is_ignored.any()
    for head in (problem.student, problem.teacher):
        head.hidden[is_ignored] = bad
    output, gradients, _ = run_fused(problem, config, gate)
    assert_same(output, gradients, expected, 1e-10)
    assert not gradients["hidden"][is_ignored].any()
    assert not output.kl_map[is_ignored].any() and (output.teacher_top1[is_ignored] == -1).all()


@pytest.mark.parametrize("length", [0, 1, 6])
@pytest.mark.parametrize("clip", ["gate", "fixed", "off"])
@pytest.mark.parametrize("num_tokens", [0, 12, torch.tensor(12)])
def test_a_call_without_valid_tokens_gives_zeros_with_a_graph(length, clip, num_tokens):
    problem = make_problem(length=length, ignored=1.1)
    student, gate = leaf(problem.student), make_gate()
    output = distill_loss(
        student, problem.teacher, problem.labels, problem.pair_mask, gate, CONFIG.replace(clip=clip), whole(problem),
        num_tokens=num_tokens, num_pairs=0,
    )  # fmt: skip
    output.loss.backward()
    assert float(output.loss.detach()) == 0.0 and float(output.kept_mass) == 0.0
    assert output.kl_map.shape == output.teacher_top1.shape == (length,)
    parameters = list(gate.parameters()) if clip == "gate" else []
    for source in (student.hidden, student.weight, student.bias, *parameters):
        assert source.grad is not None and not source.grad.any()


@pytest.mark.parametrize("kind", ["distill", "cross_entropy"])
def test_a_second_backward_is_refused(kind):
    problem = make_problem()
    student = leaf(problem.student)
    if kind == "distill":
        loss = distill_loss(
            student, problem.teacher, problem.labels, problem.pair_mask, None, CONFIG.replace(clip="off"),
            whole(problem), num_tokens=10, num_pairs=10,
        ).loss  # fmt: skip
    else:
        loss = cross_entropy(student, problem.labels, whole(problem), num_tokens=10)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up by the first backward"):
        loss.backward()


def test_a_gradient_of_the_gradient_is_refused():
    problem = make_problem()
    student = leaf(problem.student)
    loss = cross_entropy(student, problem.labels, whole(problem), num_tokens=10)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, student.hidden, create_graph=True)


def test_the_upstream_gradient_scales_everything():
    problem, gate = make_problem(), make_gate()
    _, gradients, _ = run_fused(problem, CONFIG, gate)
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    student = leaf(problem.student)
    gate.zero_grad()
    output = distill_loss(
        student, problem.teacher, problem.labels, problem.pair_mask, gate, CONFIG, whole(problem),
        num_tokens=problem.num_tokens, num_pairs=problem.num_pairs,
    )  # fmt: skip
    (output.loss * -3.0).backward()
    torch.testing.assert_close(student.hidden.grad, -3.0 * gradients["hidden"])
    torch.testing.assert_close(student.weight.grad, -3.0 * gradients["weight"])
    for name, parameter in gate.named_parameters():
        torch.testing.assert_close(parameter.grad, -3.0 * gradients[f"gate.{name}"])


def test_a_gate_may_hold_a_bound_constant():
    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.upper = torch.nn.Parameter(torch.tensor(3.0, dtype=torch.float64))

        def forward(self, sorted_log_probs, log_tail):
            return torch.full_like(log_tail, -3.0), self.upper.expand(len(log_tail))

    problem, gate, config = make_problem(), Half(), CONFIG.replace(upper=0.95)
    output, gradients, _ = run_fused(problem, config, gate)
    assert gradients["gate.upper"] != 0
    assert_same(output, gradients, run_reference(problem, config, gate), 1e-10)


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3)))
def test_only_the_wanted_gradients_are_formed(wanted):
    problem = make_problem()
    _, expected = run_reference(problem, CONFIG.replace(clip="off"), None)
    parts = [part.clone().requires_grad_(want) for part, want in zip(leaf_parts(problem), wanted, strict=True)]
    with Counter() as counter:
        output = distill_loss(
            Head(*parts), problem.teacher, problem.labels, problem.pair_mask, None,
            CONFIG.replace(clip="off", chunk_tokens=100), whole(problem),
            num_tokens=problem.num_tokens, num_pairs=problem.num_pairs,
        )  # fmt: skip
    assert counter.products == 2 + wanted[0] + wanted[1]
    assert output.loss.requires_grad == any(wanted)
    if any(wanted):
        output.loss.backward()
    for name, part, want in zip(("hidden", "weight", "bias"), parts, wanted, strict=True):
        assert (part.grad is not None) == want
        if want:
            torch.testing.assert_close(part.grad, expected[name])


def leaf_parts(problem: Problem) -> list[torch.Tensor]:
    return [problem.student.hidden, problem.student.weight, problem.student.bias]


def test_without_autograd_nothing_but_the_values_is_formed():
    problem, gate = make_problem(), make_gate()
    student = leaf(problem.student)
    with torch.no_grad(), Counter() as counter:
        output = distill_loss(
            student, problem.teacher, problem.labels, problem.pair_mask, gate, CONFIG.replace(chunk_tokens=100),
            whole(problem), num_tokens=problem.num_tokens, num_pairs=problem.num_pairs,
        )  # fmt: skip
    assert not output.loss.requires_grad
    assert counter.products == 2 + 3  # one product a head, three in the gate
    torch.testing.assert_close(output.loss, run_reference(problem, CONFIG, gate)[0]["loss"])


class Counter(TorchDispatchMode):
    """Counts matrix products and the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.products = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.products += func in (
            torch.ops.aten.mm.default,
            torch.ops.aten.mm.out,
            torch.ops.aten.addmm.default,
            torch.ops.aten.addmm.out,
            torch.ops.aten.addmm_.default,
        )
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_four_products_a_chunk_and_no_tensor_of_all_logits():
    length, num_classes, chunk = 64, 300, 8
    problem = make_problem(length=length, num_classes=num_classes, ignored=0.0)
    student = leaf(problem.student)
    config = CONFIG.replace(clip="fixed", span=0.0, chunk_tokens=chunk)
    with Counter() as counter:
        output = distill_loss(
            student, problem.teacher, problem.labels, problem.pair_mask, None, config, whole(problem),
            num_tokens=length, num_pairs=0,
        )  # fmt: skip
        output.loss.backward()
    assert counter.products == 4 * length // chunk
    assert counter.largest < 2 * chunk * num_classes < length * num_classes


def _call(problem, **changes):
    arguments = {
        "student": problem.student, "teacher": problem.teacher, "labels": problem.labels,
        "pair_mask": problem.pair_mask, "gate": None, "config": CONFIG.replace(clip="off"), "shard": whole(problem),
    } | changes  # fmt: skip
    return distill_loss(*arguments.values(), num_tokens=1, num_pairs=1)


def test_what_does_not_fit_is_refused():
    problem = make_problem()
    half = Head(problem.student.hidden, problem.student.weight[:5], problem.student.bias[:5])
    with pytest.raises(ConfigError, match="needs a gate"):
        _call(problem, config=CONFIG.replace(clip="gate"))
    with pytest.raises(ConfigError, match="top_k"):
        _call(problem, config=CONFIG.replace(clip="gate"), gate=QuantileGate(TOP_K + 1))
    with pytest.raises(ValueError, match=r"student.weight has shape \(5, 7\)"):
        _call(problem, student=half)
    with pytest.raises(ValueError, match=r"teacher.hidden has shape"):
        _call(problem, teacher=Head(problem.teacher.hidden[:3], problem.teacher.weight))
    with pytest.raises(ValueError, match=r"student.bias has shape"):
        _call(problem, student=Head(problem.student.hidden, problem.student.weight, problem.student.bias[:5]))
    for wrong in (-1, float("nan"), None, torch.ones(2)):
        with pytest.raises(ValueError, match="must be counts"):
            cross_entropy(problem.student, problem.labels, whole(problem), num_tokens=wrong)
    for wrong in (0, -1, "x", 2.5):
        with pytest.raises(ConfigError, match="loss.chunk_tokens"):
            cross_entropy(problem.student, problem.labels, whole(problem), num_tokens=1, chunk_tokens=wrong)
    with pytest.raises(ConfigError, match="auto, torch, compile, triton"):
        cross_entropy(problem.student, problem.labels, whole(problem), num_tokens=1, backend="foo")
    with pytest.raises(ValueError, match="labels must be int64"):
        _call(problem, labels=problem.labels.int())
    with pytest.raises(ValueError, match="pair_mask must be bool"):
        _call(problem, pair_mask=problem.pair_mask.long())
    with pytest.raises(ConfigError, match="needs its process group"):
        _call(problem, student=half, shard=VocabShard(0, 5, 53))
    for wrong in (53, -1):
        labels = problem.labels.clone()
        labels[0] = wrong
        with pytest.raises(DataError, match=f"label {wrong} is not a class"):
            _call(problem, labels=labels)
        with pytest.raises(DataError, match=f"label {wrong} is not a class"):
            cross_entropy(problem.student, labels, whole(problem), num_tokens=1)


def test_metrics_by_name():
    """What a step stacks and adds up over ranks: every scalar under its name in metrics.jsonl."""
    output, _, _ = run_fused(make_problem(), CONFIG, make_gate())
    metrics = output.metrics
    assert tuple(metrics) == METRIC_NAMES
    assert METRIC_NAMES == (
        "loss/sft", "loss/dac_kl", "loss/span", "loss/policy", "kept_mass", "mask/classes", "mask/few_classes",
        "gate/lower", "gate/lower_square", "gate/upper",
    )  # fmt: skip
    fields = (
        output.sft, output.dac_kl, output.span, output.policy, output.kept_mass, output.classes, output.few_classes,
        output.mean_lower, output.square_lower, output.mean_upper,
    )  # fmt: skip
    assert all(metric is value for metric, value in zip(metrics.values(), fields, strict=True))
    stacked = torch.stack(list(metrics.values()))
    assert stacked.shape == (len(METRIC_NAMES),) and not stacked.requires_grad


def test_a_head_from_hidden_states_and_an_output_head():
    problem = make_problem()
    student = problem.student
    head = Head.of(student.hidden, OutputHead(student.weight, student.bias, whole(problem)))
    assert (head.hidden, head.weight, head.bias) == (student.hidden, student.weight, student.bias)
