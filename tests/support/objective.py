"""Problems for the objective, and its comparison with the dense reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from megadistill.losses import IGNORE_INDEX, DistillOutput, Head, LossConfig, QuantileGate, TeacherTopK, distill_loss
from megadistill.losses.output import TERMS
from megadistill.losses.reference import reference_loss
from megadistill.parallel import VocabShard
from megadistill.parallel.output_head import LogitMap, OutputHead

TOP_K = 8
VALUES = tuple(field.name for field in fields(DistillOutput))
STUDENT = ("hidden", "weight", "bias")


@dataclass
class Problem:
    """Whole, unsharded heads in float64; the teacher is wider than the student."""

    student: Head
    teacher: Head | TeacherTopK
    labels: Tensor
    pair_mask: Tensor
    num_tokens: int
    num_pairs: int
    token_weights: Tensor | None = None
    rows: Tensor | None = None
    teacher_share: float = 0.0
    interpolation: float = 1.0
    temperatures: Tensor | None = None
    skews: Tensor | None = None
    ahead: Head | None = None  # the student's hidden states and its head after the virtual step

    def ahead_head(self, shard: VocabShard, dtype: torch.dtype = torch.float64) -> OutputHead | None:
        """The shard of the head after the virtual step."""
        if self.ahead is None:
            return None
        bias = None if self.ahead.bias is None else self.ahead.bias[shard.start : shard.stop].to(dtype)
        return OutputHead(self.ahead.weight[shard.start : shard.stop].to(dtype), bias, shard, self.ahead.logit_map)

    @property
    def num_classes(self) -> int:
        return len(self.student.weight)


def make_problem(
    seed: int = 0, length: int = 23, num_classes: int = 53, scale: float = 2.0, ignored: float = 0.2
) -> Problem:
    """Random heads with biases; about `ignored` of the tokens are ignored, 60 % of the rest start a pair."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def head(width: int) -> Head:
        hidden = normal(length, width) * scale / width**0.5
        return Head(hidden, normal(num_classes, width), normal(num_classes))

    student, teacher = head(7), head(9)
    labels = torch.randint(0, num_classes, (length,), generator=generator)
    labels[torch.rand(length, generator=generator) < ignored] = IGNORE_INDEX
    pair_mask = torch.rand(length, generator=generator) < 0.6
    is_valid = labels != IGNORE_INDEX
    num_pairs = int((pair_mask[:-1] & is_valid[:-1] & is_valid[1:]).sum())
    return Problem(student, teacher, labels, pair_mask, int(is_valid.sum()), num_pairs)


def with_top_k(problem: Problem, num_listed: int, temperature: float = 1.0) -> Problem:
    """The same problem with a teacher of which only `num_listed` classes a token are known, in no order."""
    assert isinstance(problem.teacher, Head)
    logits = torch.nn.functional.linear(problem.teacher.hidden, problem.teacher.weight, problem.teacher.bias)
    log_probs = (logits / temperature).log_softmax(-1)
    values, ids = log_probs.topk(num_listed, -1)
    tail = log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1)
    order = torch.randperm(num_listed, generator=torch.Generator().manual_seed(0))
    return replace(problem, teacher=TeacherTopK(ids[:, order], values[:, order], tail, temperature))


def with_logit_maps(problem: Problem) -> Problem:
    """The same problem with families that bend their logits: Gemma's cap beside Granite's factor, and both in one."""
    assert isinstance(problem.teacher, Head)
    return replace(
        problem,
        student=replace(problem.student, logit_map=LogitMap(1.5, 3.0)),
        teacher=replace(problem.teacher, logit_map=LogitMap(0.4)),
    )


def make_rows(problem: Problem, teacher_share: float = 0.0) -> Problem:
    """The same problem with its tokens in rows of 1 to 9, in chunks and across them."""
    lengths = torch.tensor([3, 1, 9, 2, 100])
    rows = torch.arange(5).repeat_interleave(lengths)[: len(problem.labels)]
    return replace(problem, rows=rows, teacher_share=teacher_share)


def make_skews(problem: Problem) -> Problem:
    """The same problem with a skew of each token's own."""
    return replace(problem, skews=torch.linspace(0.01, 0.4, len(problem.labels), dtype=torch.float64))


def with_temperatures(problem: Problem) -> Problem:
    """The same problem with a temperature for each token, and none (0) where it is ignored."""
    spread = torch.rand(len(problem.labels), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return replace(problem, temperatures=torch.where(problem.labels == IGNORE_INDEX, 0.0, 0.6 + 1.6 * spread))


def dense_difficulty(problem: Problem, temperature: float) -> Tensor:
    """The Hellinger distance [T] of both models."""
    assert isinstance(problem.teacher, Head)
    roots = [
        (torch.nn.functional.linear(head.hidden, head.weight, head.bias) / temperature).softmax(-1).sqrt()
        for head in (problem.student, problem.teacher)
    ]
    return (roots[0] - roots[1]).norm(dim=-1) / 2**0.5


# Every option of the mask, each pair of two that meet in the code at least once.
MASKS = [
    dict(zip(("clip", "remainder", "temperature", "upper", "coverage"), case, strict=True))
    for case in [
        ("gate", "bucket", 1.0, 1.0, "absolute"), ("gate", "truncate", 2.0, 1.0, "relative"),
        ("gate", "renormalize", 1.0, 1.0, "relative"), ("gate", "none", 2.0, 1.0, "absolute"),
        ("gate", "bucket", 2.0, 0.95, "relative"), ("gate", "truncate", 1.0, 0.95, "absolute"),
        ("gate", "renormalize", 2.0, 0.95, "absolute"), ("gate", "none", 1.0, 0.95, "relative"),
        ("fixed", "bucket", 2.0, 1.0, "absolute"), ("fixed", "truncate", 1.0, 0.95, "absolute"),
        ("fixed", "renormalize", 1.0, 0.95, "absolute"), ("fixed", "none", 2.0, 1.0, "absolute"),
        ("entropy", "bucket", 1.0, 0.95, "absolute"), ("entropy", "truncate", 2.0, 1.0, "absolute"),
        ("off", "bucket", 1.0, 1.0, "absolute"), ("off", "bucket", 2.0, 1.0, "absolute"),
    ]
]  # fmt: skip


def make_gate(
    top_k: int = TOP_K, *, seed: int = 0, spread: float = 0.3, guards: bool = True, upper: float = 1.0
) -> nn.Module:
    """A float64 gate moved off its starting point, so that every parameter matters."""
    gate = QuantileGate(top_k, guards=guards, seed=seed, upper=upper).double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter += spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return gate


def leaf(head: Head, dtype: torch.dtype = torch.float64, shard: VocabShard | None = None, device: str = "cpu") -> Head:
    """Fresh leaves that need gradients, sliced to a shard."""
    classes = slice(None) if shard is None else slice(shard.start, shard.stop)

    def fresh(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype).clone().requires_grad_()

    bias = None if head.bias is None else fresh(head.bias[classes])
    return Head(fresh(head.hidden), fresh(head.weight[classes]), bias, head.logit_map)


def run_fused(
    problem: Problem,
    config: LossConfig,
    gate: nn.Module | None,
    *,
    shard: VocabShard | None = None,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> tuple[DistillOutput, dict[str, Tensor], Head]:
    """(output, gradients by name, the teacher's leaves) of one call and its backward pass."""
    shard = shard or VocabShard(0, problem.num_classes, problem.num_classes)
    student = leaf(problem.student, dtype, shard, device)
    teacher = leaf(problem.teacher, dtype, shard, device) if isinstance(problem.teacher, Head) else problem.teacher
    if gate is not None:
        gate.zero_grad(set_to_none=True)
    output = distill_loss(
        student, teacher, problem.labels.to(device), problem.pair_mask.to(device), gate, config, shard,
        num_tokens=problem.num_tokens, num_pairs=problem.num_pairs, token_weights=problem.token_weights,
        rows=problem.rows, teacher_share=problem.teacher_share, skews=problem.skews,
        ahead=problem.ahead_head(shard, dtype), interpolation=problem.interpolation,
        temperatures=problem.temperatures,
    )  # fmt: skip
    output.loss.backward()
    gradients = {name: getattr(student, name).grad for name in STUDENT if getattr(student, name) is not None}
    if gate is not None and config.uses_gate:
        gradients |= {f"gate.{name}": parameter.grad for name, parameter in gate.named_parameters()}
    return output, gradients, teacher


def run_reference(
    problem: Problem, config: LossConfig, gate: nn.Module | None, shard: VocabShard | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(values, gradients by name) of the dense reference; class-wise gradients sliced to the shard."""
    student = leaf(problem.student)
    output = reference_loss(
        student, problem.teacher, problem.labels, problem.pair_mask, gate, config,
        num_tokens=problem.num_tokens, num_pairs=problem.num_pairs, token_weights=problem.token_weights,
        rows=problem.rows, teacher_share=problem.teacher_share, skews=problem.skews,
        ahead=problem.ahead_head(VocabShard(0, problem.num_classes, problem.num_classes)),
        interpolation=problem.interpolation, temperatures=problem.temperatures,
    )  # fmt: skip
    names = [name for name in STUDENT if getattr(student, name) is not None]
    sources = [getattr(student, name) for name in names]
    gradients = dict(zip(names, torch.autograd.grad(output.loss, sources, retain_graph=True), strict=True))
    if shard is not None:
        of_classes = [name for name in names if name != "hidden"]
        gradients |= {name: gradients[name][shard.start : shard.stop] for name in of_classes}
    if gate is not None and config.uses_gate:
        names, parameters = zip(*gate.named_parameters(), strict=True)
        of_gate: Sequence[Tensor] = torch.autograd.grad(output.gate_objective, parameters, materialize_grads=True)
        gradients |= {f"gate.{name}": gradient for name, gradient in zip(names, of_gate, strict=True)}
    absent = [name for name in TERMS if getattr(config, name) == 0]  # not computed, so reported as 0
    values = {name: getattr(output, name).detach() for name in VALUES}
    return values | {name: torch.zeros_like(values[name]) for name in absent}, gradients


def assert_same(
    output: DistillOutput,
    gradients: dict[str, Tensor],
    expected: tuple[dict[str, Tensor], dict[str, Tensor]],
    tolerance: float,
) -> None:
    """Every value and every gradient within `tolerance` of the largest entry of what is expected."""
    values, expected_gradients = expected
    assert gradients.keys() == expected_gradients.keys()
    for name, value in values.items():
        _assert_close(name, getattr(output, name).detach(), value, tolerance)
    for name, gradient in expected_gradients.items():
        _assert_close(f"gradient of {name}", gradients[name], gradient, tolerance)


def _assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual is not None, f"{name} is missing"
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    scale = max(float(expected.abs().max()), 1e-4)  # what cancels to nothing is compared absolutely
    error = float((actual.double().cpu() - expected.double()).abs().max()) / scale
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"
