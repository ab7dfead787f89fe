"""Which backend runs, the error when it cannot, and what it may cost in memory."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megadistill.errors import ConfigError
from megadistill.losses import LossConfig, backends, fused, torch_kernels
from megadistill.losses.backends import check_backend, make_kernels
from megadistill.losses.divergences import DIVERGENCES
from megadistill.losses.tiles import TileSpec
from megadistill.losses.torch_kernels import CompiledKernels, TorchKernels
from megadistill.parallel import VocabShard
from tests.support.objective import TOP_K, assert_same, make_gate, make_problem, run_fused, run_reference

ROOT = Path(__file__).parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CONFIG = LossConfig(top_k=TOP_K, chunk_tokens=5)


def shard(num_classes: int) -> VocabShard:
    return VocabShard(0, num_classes, num_classes)


@pytest.fixture
def has(monkeypatch):
    """Pretends that a machine has the named things and nothing else."""
    if backends.has_triton():
        # It decides at its first import whether its kernels run in the interpreter.
        importlib.import_module("megadistill.losses.triton_backend")

    def pretend(*names: str) -> None:
        monkeypatch.setattr(backends, "has_compiler", lambda: "compiler" in names)
        monkeypatch.setattr(backends, "has_triton", lambda: "triton" in names)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    return pretend


def test_auto_compiles_large_vocabularies_where_there_is_a_compiler(has):
    has("compiler")
    assert type(make_kernels("auto", shard(8192), CPU)) is CompiledKernels
    assert type(make_kernels("auto", shard(8191), CPU)) is TorchKernels
    has()
    assert type(make_kernels("auto", shard(8192), CPU)) is TorchKernels


def test_auto_on_cuda_is_triton_where_it_is_installed(has):
    has()
    assert type(make_kernels("auto", shard(99), CUDA)) is TorchKernels
    pytest.importorskip("triton")
    has("triton")
    assert type(make_kernels("auto", shard(99), CUDA)).__name__ == "TritonKernels"


@pytest.mark.parametrize(
    ("backend", "device", "there", "message"),
    [
        ("compile", CPU, [], "loss.backend=compile needs a C[+][+] compiler"),
        ("compile", CUDA, ["compiler"], "loss.backend=compile needs the package triton"),
        ("triton", CPU, ["triton"], "needs a CUDA device and the package triton; the device is cpu"),
        ("triton", CUDA, [], "triton is not installed"),
    ],
)
def test_what_cannot_run_is_refused(has, backend, device, there, message):
    has(*there)
    with pytest.raises(ConfigError, match=message):
        check_backend(backend, device)


def test_a_compiler_that_fails(monkeypatch):
    """auto continues in eager torch with one warning; `compile` is an error."""
    calls = []

    def broken(*arguments):
        calls.append(arguments)
        raise torch._dynamo.exc.BackendCompilerFailed(lambda: None, RuntimeError("no space left"), None)

    monkeypatch.setattr(torch_kernels, "_compiled", lambda function, spec, is_cpu: broken)
    problem, gate = make_problem(), make_gate()
    kernels = CompiledKernels(may_fall_back=True)
    monkeypatch.setattr(backends, "_kernels", lambda backend, may_fall_back: kernels)
    with pytest.warns(RuntimeWarning, match="eager torch, which is slower: .*no space left"):
        output, gradients, _ = run_fused(problem, CONFIG, gate)
    assert len(calls) == 1
    assert_same(output, gradients, run_reference(problem, CONFIG, gate), 1e-10)
    monkeypatch.setattr(backends, "_kernels", lambda backend, may_fall_back: CompiledKernels())
    with pytest.raises(ConfigError, match="loss.backend=compile: .*no space left"):
        run_fused(problem, CONFIG, gate)


def test_a_chunk_without_a_pair_takes_no_pass_for_spans(monkeypatch):
    """Nor does a token without a pair get anything of a pair's, such as NaN."""
    called = []
    monkeypatch.setattr(torch_kernels.tile_span, "span_gradient", lambda *arguments: called.append(arguments))
    problem = make_problem(ignored=0.0)
    problem.pair_mask[:] = False
    problem.pair_mask[[3, 8]] = True
    config = CONFIG.replace(backend="compile", chunk_tokens=5)
    problem.student.hidden[3] = torch.nan
    gradients = run_fused(problem, config, make_gate())[1]
    assert not called
    is_nan = gradients["hidden"].isnan().any(-1)
    assert is_nan.nonzero().flatten().tolist() == [3, 4]


def test_a_compiler_that_fails_at_the_derivative(monkeypatch):
    """Eager torch takes over where the derivative was to replace the logits that the span term still reads."""
    kernels, compiled = CompiledKernels(may_fall_back=True), torch_kernels._compiled

    def some_broken(function, spec, is_cpu):
        def broken(*arguments):
            raise torch._dynamo.exc.BackendCompilerFailed(lambda: None, RuntimeError("no space left"), None)

        return broken if "gradient" in function.__name__ else compiled(function, spec, is_cpu)

    monkeypatch.setattr(torch_kernels, "_compiled", some_broken)
    monkeypatch.setattr(backends, "_kernels", lambda backend, may_fall_back: kernels)
    for changes in ({}, {"span": 0.0}):
        kernels._is_broken = False
        problem, gate, config = make_problem(), make_gate(), CONFIG.replace(**changes)
        with pytest.warns(RuntimeWarning, match="eager torch, which is slower"):
            output, gradients, _ = run_fused(problem, config, gate)
        assert_same(output, gradients, run_reference(problem, config, gate), 1e-10)


def test_blocks_of_tokens_change_nothing(monkeypatch):
    problem, gate = make_problem(ignored=0.0), make_gate()
    config = CONFIG.replace(chunk_tokens=100)
    whole = run_fused(problem, config, gate)[0]
    for elements in (1, 53 * 3, 53 * 7):
        monkeypatch.setattr(torch_kernels, "_EAGER_BLOCK", elements)
        output, gradients, _ = run_fused(problem, config, gate)
        assert_same(output, gradients, run_reference(problem, config, gate), 1e-10)
        torch.testing.assert_close(output.loss, whole.loss, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("change", "is_clipped", "formula"),
    [
        ({}, True, None),
        ({"dac_kl": 0.0}, False, None),
        ({"dac_kl": 0.0, "divergence": "reverse_kl"}, False, None),
        ({"clip": "off"}, False, None),
        ({"divergence": "reverse_kl"}, False, DIVERGENCES["reverse_kl"].formula),
    ],
)
def test_a_term_of_weight_0_has_no_kernel(change, is_clipped, formula):
    spec = TileSpec.of(CONFIG.replace(**change), has_edges=False)
    assert (spec.is_clipped, spec.formula) == (is_clipped, formula)


def test_the_automatic_chunk(monkeypatch):
    """From the shard's width and the memory."""
    monkeypatch.setattr(fused, "_total_memory", lambda device: 2**40)
    assert [fused.chunk_size("auto", shard(v), CPU) for v in (2**15, 2**17, 2**20, 100)] == [256, 64, 16, 4096]
    monkeypatch.setattr(fused, "_total_memory", lambda device: 2**30)
    assert fused.chunk_size("auto", shard(2**15), CPU) == 128
    assert fused.chunk_size(7, shard(2**15), CPU) == 7


_MEASURE = """
import sys, torch
from megadistill.losses import Head, LossConfig, distill_loss
from megadistill.parallel import VocabShard
from tools.benchmarks.measure import peak_bytes
torch.set_num_threads(1)
num_classes, width, chunk = 50_000, 16, 32
weights = [torch.randn(num_classes, width) for _ in range(2)]
for num_chunks in (4, 40):
    length = num_chunks * chunk
    student = Head(torch.randn(length, width).requires_grad_(), weights[0].requires_grad_())
    arguments = student, Head(torch.randn(length, width), weights[1]), torch.randint(0, num_classes, (length,))
    pairs, config = torch.ones(length, dtype=torch.bool), LossConfig(clip="fixed", chunk_tokens=chunk, backend="torch")
    def call():
        weights[0].grad = None
        loss = distill_loss(*arguments, pairs, None, config, VocabShard(0, num_classes, num_classes), num_tokens=length, num_pairs=length).loss
        loss.backward()
    call()
    print(peak_bytes(call, torch.device("cpu")))
"""  # fmt: skip # noqa: E501


def test_memory_does_not_grow_with_the_tokens():
    """Ten times as many tokens need no more; in a separate process, whose memory is clean."""
    result = subprocess.run([sys.executable, "-c", _MEASURE], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    few, many = (int(line) for line in result.stdout.split())
    tile = 4 * 50_000 * 32
    assert many < few + 3 * tile  # all logits of one model would be 40 tiles
    assert few < 8 * tile  # three tiles, and the weight's gradient of half a tile
