"""The objective on a GPU: every backend, float64 to bfloat16, against the dense float64 reference on the CPU."""

from dataclasses import replace

import pytest
import torch

from megadistill.losses import Head, LossConfig, cross_entropy, distill_loss, token_kl
from megadistill.parallel import VocabShard
from tests.support.backends import BACKENDS
from tests.support.objective import TOP_K, assert_same, leaf, make_gate, make_problem, run_fused, run_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CONFIG = LossConfig(sft=0.7, dac_kl=1.3, span=2.0, top_k=TOP_K, chunk_tokens=5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("change", [{}, {"temperature": 2.0}, {"remainder": "renormalize"}, {"clip": "off"}])
def test_equals_the_reference(backend, dtype, tolerance, change):
    problem, gate = make_problem(num_classes=9000, length=12), make_gate()
    config = CONFIG.replace(backend=backend, **change)
    expected = run_reference(problem, config, gate)
    output, gradients, _ = run_fused(problem, config, gate.to("cuda", dtype), dtype=dtype, device="cuda")
    assert_same(output, gradients, expected, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_products_accumulate_in_float32(backend):
    """Values as exact as float32's; gradients rounded twice, with each product's operand and at the end."""
    problem = make_problem(num_classes=9000, length=40)
    heads = [
        Head(*(part.bfloat16().double() for part in (head.hidden, head.weight)))
        for head in (problem.student, problem.teacher)
    ]
    problem, gate = replace(problem, student=heads[0], teacher=heads[1]), make_gate()
    config = CONFIG.replace(backend=backend)
    values, expected = run_reference(problem, config, gate)
    output, gradients, _ = run_fused(problem, config, gate.float().cuda(), dtype=torch.bfloat16, device="cuda")
    assert output.loss.dtype == torch.float32 and gradients["weight"].dtype == torch.bfloat16
    assert_same(output, {}, (values, {}), 2e-5)
    for name in ("hidden", "weight"):
        error = (gradients[name].double().cpu() - expected[name]).norm() / expected[name].norm()
        assert float(error) < 2**-7, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_entropy_and_token_kl(backend):
    problem = make_problem(num_classes=9000, length=40, ignored=0.0)
    shard = VocabShard(0, 9000, 9000)
    student, teacher = (leaf(head, torch.float32, None, "cuda") for head in (problem.student, problem.teacher))
    values, _ = run_reference(problem, CONFIG.replace(clip="off"), None)
    loss = cross_entropy(student, problem.labels.cuda(), shard, num_tokens=problem.num_tokens, backend=backend)
    assert float(loss) == pytest.approx(float(values["sft"]), rel=1e-5)
    kl_map, top1 = token_kl(student, teacher, shard, backend=backend)
    torch.testing.assert_close(kl_map.double().cpu(), values["kl_map"], rtol=1e-4, atol=1e-5)
    assert torch.equal(top1.cpu(), values["teacher_top1"])


def test_memory_is_that_of_a_chunk():
    """No [T, V] tensor: three tiles, the gradients, and what their rounding to the inputs' dtype needs."""
    length, num_classes, width, chunk = 4096, 32768, 256, 256

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").bfloat16()

    heads = [Head(normal(length, width), normal(num_classes, width)) for _ in range(2)]
    student = Head(heads[0].hidden.requires_grad_(), heads[0].weight.requires_grad_())
    labels = torch.randint(0, num_classes, (length,), device="cuda")
    pairs = torch.ones(length, dtype=torch.bool, device="cuda")
    shard, config = VocabShard(0, num_classes, num_classes), LossConfig(clip="fixed", chunk_tokens=chunk)
    arguments = (student, heads[1], labels, pairs, None, config, shard)
    distill_loss(*arguments, num_tokens=length, num_pairs=length).loss.backward()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    distill_loss(*arguments, num_tokens=length, num_pairs=length).loss.backward()
    tile, gradients = 4 * chunk * num_classes, 4 * (length + num_classes) * width
    assert torch.cuda.max_memory_allocated() - base < 4 * tile + 3 * gradients
