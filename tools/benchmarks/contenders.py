"""What is measured: the floor (matrix products alone), ours, dense code as a user would write it, and installed peers.

Every contender does forward and backward of one call on the same inputs and leaves gradients in ``problem.student``.
``work`` names what it computes: "products", "ce+kl" (cross-entropy and forward KL), "kl", "full" (with DAC-KL, gate
and span) or an option in place of its default (``OPTIONS``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megadistill.losses import Head, LossConfig, QuantileGate, distill_loss
from megadistill.losses.backends import has_compiler, has_triton
from megadistill.losses.fused import chunk_size
from megadistill.losses.quantile import find_thresholds
from megadistill.parallel import VocabShard

FULL = LossConfig()
CE_KL = FULL.replace(clip="off", span=0.0)
# Everything, with one option changed.
OPTIONS = {
    "span log": FULL.replace(span_relation="log"),
    "truncate": FULL.replace(remainder="truncate"),
    "none": FULL.replace(remainder="none"),
    "entropy": FULL.replace(clip="entropy"),
    "upper 0.98": FULL.replace(upper=0.98),
}


@dataclass
class Problem:
    """Two heads of one size, labels and span pairs; logits of a language model's spread."""

    student: Head
    teacher: Head
    labels: Tensor
    pairs: Tensor
    gate: QuantileGate
    two_sided_gate: QuantileGate
    shard: VocabShard
    num_pairs: int

    @property
    def num_tokens(self) -> int:
        return len(self.labels)

    def clear(self) -> None:
        """Forgets all gradients."""
        for part in (
            self.student.hidden,
            self.student.weight,
            *self.gate.parameters(),
            *self.two_sided_gate.parameters(),
        ):
            part.grad = None


@dataclass(frozen=True)
class Contender:
    """A way to compute the loss.

    Attributes:
        name: Its name in the table.
        work: What it computes.
        run: Forward and backward.
        scale: Factor that makes its gradients those of CE + KL (or KL) with weights 1, mean over the tokens.
        dense_tiles: Number of [T, V] float32 tensors that it holds at its peak.
        on: The same contender on another problem.
    """

    name: str
    work: str
    run: Callable[[], Any]
    scale: float = 1.0
    dense_tiles: float = 0.0
    on: Callable[[Problem], Contender] | None = None


def make_problem(
    num_tokens: int, shard: VocabShard, width: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Problem:
    """Student logits of standard deviation about 2.3, teacher's about 6.8; half of the tokens start a span pair."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

    spread = (512 / width) ** 0.5
    hidden = normal(num_tokens, width, scale=0.1 * spread), normal(num_tokens, width, scale=0.3 * spread)
    weights = normal(shard.size, width), normal(shard.size, width)
    labels = torch.randint(0, shard.total, (num_tokens,), generator=generator, device=device)
    pairs = torch.rand(num_tokens, generator=generator, device=device) < 0.5
    pairs[-1] = False
    student = Head(hidden[0].requires_grad_(), weights[0].requires_grad_())
    gates = QuantileGate().to(device), QuantileGate(upper=0.98).to(device)
    return Problem(student, Head(hidden[1], weights[1]), labels, pairs, *gates, shard, int(pairs.sum()))


def first_tokens(problem: Problem) -> Problem:
    """The first two chunks and one token more: every kind of chunk."""
    first = slice(2 * chunk_size("auto", problem.shard, problem.labels.device) + 1)
    student, teacher = (replace(head, hidden=head.hidden[first]) for head in (problem.student, problem.teacher))
    pairs = problem.pairs[first]
    return replace(problem, student=student, teacher=teacher, labels=problem.labels[first], pairs=pairs)


def floor(problem: Problem) -> Contender:
    """The four products of a chunk and nothing else, at the chunk size of ours."""
    student, teacher = problem.student, problem.teacher
    size = chunk_size("auto", problem.shard, student.hidden.device)
    is_half = student.hidden.dtype == torch.bfloat16

    @torch.no_grad()
    def run() -> None:
        hidden_grad = torch.zeros_like(student.hidden, dtype=torch.float32)
        weight_grad = torch.zeros_like(student.weight, dtype=torch.float32)
        for start in range(0, problem.num_tokens, size):
            chunk = slice(start, start + size)
            hidden = student.hidden[chunk]
            if is_half:
                torch.mm(teacher.hidden[chunk], teacher.weight.T, out_dtype=torch.float32)
                tile = torch.mm(hidden, student.weight.T, out_dtype=torch.float32).to(hidden.dtype)
                hidden_grad[chunk] = torch.mm(tile, student.weight, out_dtype=torch.float32)
                torch.ops.aten.addmm.dtype_out(weight_grad, tile.T, hidden, torch.float32, out=weight_grad)
                continue
            tile = hidden.new_empty(len(hidden), len(student.weight))
            torch.mm(teacher.hidden[chunk], teacher.weight.T, out=tile)
            torch.mm(hidden, student.weight.T, out=tile)
            torch.mm(tile, student.weight, out=hidden_grad[chunk])
            weight_grad.addmm_(tile.T, hidden)

    return Contender("floor: the four products", "products", run, on=floor)


def ours(problem: Problem, backends: list[str]) -> Iterator[Contender]:
    """The objective on each backend."""
    for backend in backends:
        options = OPTIONS if backend == backends[0] else {}
        for work, config in {"ce+kl": CE_KL, "full": FULL, **options}.items():
            yield _one_of_ours(backend, work, config.replace(backend=backend), problem)


def _one_of_ours(backend: str, work: str, config: LossConfig, problem: Problem) -> Contender:
    gate = problem.gate if config.upper == 1 else problem.two_sided_gate

    def run() -> None:
        distill_loss(
            problem.student, problem.teacher, problem.labels, problem.pairs, gate, config, problem.shard,
            num_tokens=problem.num_tokens, num_pairs=problem.num_pairs,
        ).loss.backward()  # fmt: skip

    return Contender(f"megadistill, {backend}", work, run, on=lambda other: _one_of_ours(backend, work, config, other))


def usable_backends(device: torch.device) -> list[str]:
    """The backends of this machine, the fastest first."""
    found = ["triton"] if device.type == "cuda" and has_triton() else []
    if has_triton() if device.type == "cuda" else has_compiler():
        found.append("compile")
    return [*found, "torch"]


def dense(problem: Problem) -> Iterator[Contender]:
    """Plain torch over whole logits, eager and through torch.compile."""
    if problem.shard.tp_size > 1:
        return
    compiled_plain = torch.compile(_dense_ce_kl, dynamic=False)
    compiled_full = torch.compile(_dense_full, dynamic=False)
    yield Contender("dense, eager", "ce+kl", lambda: _dense_ce_kl(problem).backward(), dense_tiles=8)
    yield Contender("dense, torch.compile", "ce+kl", lambda: compiled_plain(problem).backward(), dense_tiles=5)
    yield Contender("dense, eager", "full", lambda: _dense_full(problem).backward(), dense_tiles=24)
    yield Contender("dense, torch.compile", "full", lambda: compiled_full(problem).backward(), dense_tiles=14)


def peers(problem: Problem) -> Iterator[Contender]:
    """Liger's and TRL's chunked losses, where they are installed; neither supports shards."""
    if problem.shard.tp_size > 1:
        return
    student, teacher = problem.student, problem.teacher
    size = chunk_size("auto", problem.shard, student.hidden.device)
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError:
        LigerFusedLinearJSDLoss = None
    if LigerFusedLinearJSDLoss is not None:
        for is_compiled in (False, True):
            loss = LigerFusedLinearJSDLoss(beta=0.0, compiled=is_compiled, chunk_size=size)
            yield Contender(
                f"Liger chunked JSD, {'compiled' if is_compiled else 'eager'}",
                "ce+kl",
                partial(_run_liger, loss, problem),
                scale=2.0,  # it weighs both terms with a half
                dense_tiles=8 * size / problem.num_tokens,
            )
    try:
        import trl.kernels.chunked_divergence as trl_kernels
    except ImportError:
        return

    def run_trl() -> None:
        arguments = (student.hidden, student.weight, None, teacher.hidden, teacher.weight, None, 0.0)
        trl_kernels.ChunkedDivergenceFunction.apply(*arguments)[0].mean().backward()

    yield Contender("TRL chunked divergence (KL alone)", "kl", run_trl, dense_tiles=4 * 32768 / len(student.weight))


def _run_liger(loss: Any, problem: Problem) -> None:
    student, teacher = problem.student, problem.teacher
    loss(student.hidden, student.weight, teacher.hidden, teacher.weight, problem.labels).backward()


def versions() -> dict[str, str]:
    """Versions of the peers."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("liger-kernel", "trl", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _dense_ce_kl(problem: Problem) -> Tensor:
    with torch.no_grad():
        log_p = (problem.teacher.hidden @ problem.teacher.weight.T).float().log_softmax(-1)
    logits = (problem.student.hidden @ problem.student.weight.T).float()
    kl = F.kl_div(logits.log_softmax(-1), log_p, log_target=True, reduction="batchmean")
    return F.cross_entropy(logits, problem.labels) + kl


@torch.no_grad()
def _dense_thresholds(beside: Tensor, log_p: Tensor, top: Tensor, log_tail: Tensor, problem: Problem) -> Tensor:
    """Lower thresholds [T] for probabilities ``beside`` the top class."""

    def masses_at(nodes: Tensor, upper: Tensor | None, is_wide: bool) -> Tensor:
        return torch.stack([
            (beside * torch.sigmoid((node.unsqueeze(-1) - log_p) / FULL.softness)).sum(-1)
            for node in nodes.float().unbind(-1)
        ], -1)  # fmt: skip

    lambda_l, _ = problem.gate(top, log_tail)
    log_beside = torch.cat([top[:, 1:], log_tail.unsqueeze(-1)], -1).logsumexp(-1)
    return find_thresholds(
        masses_at, lambda_l, None, log_top=top[:, 0], log_beside=log_beside, softness=FULL.softness,
        num_classes=log_p.shape[-1],
    ).theta_l.float()  # fmt: skip


def _dense_full(problem: Problem) -> Tensor:
    """The whole objective, as short as it can be written."""
    config = FULL
    with torch.no_grad():
        log_p = (problem.teacher.hidden @ problem.teacher.weight.T).float().log_softmax(-1)
        top, index = log_p.topk(config.top_k, -1)
        log_tail = log_p.scatter(-1, index, -math.inf).logsumexp(-1)
    logits = (problem.student.hidden @ problem.student.weight.T).float()
    log_q = logits.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    theta = _dense_thresholds(p.scatter(-1, index[:, :1], 0.0), log_p, top, log_tail, problem)
    mask = torch.sigmoid((log_p - theta.unsqueeze(-1)) / config.softness)
    mask = mask.scatter(-1, log_p.argmax(-1, keepdim=True), 1.0)
    clipped_p, clipped_q = ((1 - mask) * p).sum(-1), ((1 - mask) * q).sum(-1)
    tiny = torch.finfo(torch.float32).tiny
    dac = (mask * p * (log_p - log_q)).sum(-1)
    dac = dac + clipped_p * (clipped_p.clamp_min(tiny).log() - clipped_q.clamp_min(tiny).log())
    coverage = config.coverage_weight * F.relu(clipped_p - config.coverage_target).square()
    distance = ((q[:-1] * q[1:] - p[:-1] * p[1:]).square().sum(-1) + config.span_eps**2).sqrt() - config.span_eps
    span = (distance * problem.pairs[:-1]).sum() / problem.num_pairs
    return F.cross_entropy(logits, problem.labels) + (dac + coverage).mean() + span
