"""Decoding and sampling on a GPU: what the CPU writes, and bfloat16 close to it."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from megadistill.config.sampling import SamplingOptions
from megadistill.decoding.decoder import PlanDecoder
from megadistill.decoding.hf_decoder import HFDecoder, make_decoder
from megadistill.decoding.kv_cache import PrefillChunk
from megadistill.decoding.rollout import Correction, RolloutState, rollout
from megadistill.decoding.sampling import Sampling, draw_tokens
from megadistill.decoding.token_steps import INTERVAL, Stepping
from megadistill.models.families import FAMILIES
from megadistill.parallel import VocabShard
from megadistill.parallel.rng import uniform
from tests.support.runs import FAMILY_CONFIGS
from tests.unit.test_decoding import EOS, GREEDY, LIMIT, PROMPTS, SAMPLES, SHARD, VARIANTS, make_model, prepared
from tests.unit.test_static_step import SAMPLINGS, assert_same, history

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LIMITS = [LIMIT] * len(PROMPTS)


def on_gpu(
    model: torch.nn.Module, variant: str, stepping: Stepping | None = None, shard: VocabShard = SHARD
) -> PlanDecoder | HFDecoder:
    family, moved = FAMILIES[VARIANTS[variant][0]], copy.deepcopy(model).cuda()
    return make_decoder(moved, family.plan(moved), shard, torch.device("cuda"), stepping=stepping)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("by_forward", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_cpus_text(variant: str, by_forward: bool, dtype: torch.dtype) -> None:
    """Prompts of unequal length, together and a few at a time; then corrections, and hidden states kept and read."""
    model = make_model(variant, dtype)
    cpu = prepared(model, variant)
    gpu = on_gpu(model, variant)
    if by_forward:
        gpu = HFDecoder(copy.deepcopy(model).cuda(), torch.device("cuda"), gpu.head)
    for max_examples in (1, 3, 64):
        actual, expected = (
            rollout(
                decoder, SAMPLES, limits=LIMITS, eos_ids=frozenset({EOS}), sampling=GREEDY, max_examples=max_examples
            )
            for decoder in (gpu, cpu)
        )
        assert actual == expected
    rollouts = []
    for decoder in (gpu, cpu):
        state = RolloutState(
            decoder, SAMPLES, limits=LIMITS, eos_ids=frozenset({EOS}), sampling=GREEDY, keep_hidden=True
        )
        state.write(0)
        lengths = [len(response) for response in state.responses()]
        places = {0: (2, 50), 1: (7, 51), 3: (0, 52)}
        state.rewrite([Correction(row, *at) for row, at in places.items() if at[0] < lengths[row]], 0)
        rollouts.append(state)
    assert rollouts[0].responses() == rollouts[1].responses()
    texts = [PrefillChunk(0, 0, (*p, *r[:-1])) for p, r in zip(PROMPTS, rollouts[0].responses(), strict=True)]
    for row, (prompt, states) in enumerate(zip(PROMPTS, gpu.read(texts), strict=True)):
        kept = rollouts[0].hidden(row)
        torch.testing.assert_close(kept, states[len(prompt) - 1 :], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(kept.cpu(), rollouts[1].hidden(row), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("variant", list(FAMILY_CONFIGS))
def test_bfloat16_stays_close(variant: str) -> None:
    """Logits of a given text, written token by token over the cache."""
    model = make_model(variant)
    model.load_state_dict({name: value * 0.1 ** (value.dim() > 1) for name, value in model.state_dict().items()})
    prepared(model, variant)
    exact, rough = on_gpu(model, variant), on_gpu(model.bfloat16(), variant)
    states = [decoder.new_state([max(map(len, PROMPTS)) - len(p) for p in PROMPTS], 16) for decoder in (exact, rough)]
    actual = [decoder.prefill(state, PROMPTS) for decoder, state in zip((exact, rough), states, strict=True)]
    for column in range(6, 12):
        tokens = torch.arange(len(PROMPTS), device="cuda") + column
        one, other = (decoder.logits(hidden) for decoder, hidden in zip((exact, rough), actual, strict=True))
        assert other.dtype == torch.float32
        assert float((one - other).norm() / one.norm()) < 0.03
        actual = [decoder.decode(state, tokens, column) for decoder, state in zip((exact, rough), states, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("temperature", "options"), [(1.0, {}), (0.7, {"top_k": 50}), (1.0, {"top_p": 0.8}), (0.0, {})]
)
def test_the_cpus_tokens(dtype: torch.dtype, temperature: float, options: dict[str, float]) -> None:
    """The same numbers and the same classes for the same logits, whatever the device adds up first."""
    shard, rows = VocabShard(0, 50257, 50257), 300
    logits = torch.randn(rows, shard.total, generator=torch.Generator().manual_seed(0)).to(dtype) * 3
    ids, positions = torch.arange(rows), torch.arange(rows) % 7
    sampling = Sampling(5, temperature, SamplingOptions(**options))
    numbers = uniform(5, ids, positions, stream=1)
    assert torch.equal(uniform(5, ids.cuda(), positions.cuda(), stream=1).cpu(), numbers)
    actual, expected = (
        draw_tokens(logits.to(device), shard, numbers.to(device), sampling).cpu() for device in ("cuda", "cpu")
    )
    assert torch.equal(actual, expected)


def test_steps_leave_no_memory_behind() -> None:
    """Recorded steps and their caches go with the state, and a new recording needs no new workspace."""
    decoder = on_gpu(make_model("llama"), "llama")
    used = []
    for _ in range(6):
        rollout(decoder, SAMPLES, limits=LIMITS, eos_ids=frozenset(), sampling=GREEDY)
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert used[-1] == used[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["llama with grouped heads", "qwen3", "opt"])
def test_recorded_steps_are_the_steps(variant: str, dtype: torch.dtype) -> None:
    """Greedy and sampled, written and corrected, with responses that end anywhere; in float32 also the CPU's texts."""
    model = make_model(variant, dtype)
    cpu = prepared(model, variant)
    for sampling in SAMPLINGS:
        recorded = history(on_gpu(model, variant), sampling)
        as_they_are = history(on_gpu(model, variant, Stepping(INTERVAL, is_static=True)), sampling)
        assert_same(recorded, as_they_are, 0.0)
        if dtype == torch.float32:
            texts = [[texts for texts, *_ in found] for found in (recorded, history(cpu, sampling))]
            assert texts[0] == texts[1]


def test_what_is_not_finite_in_recorded_steps() -> None:
    model = make_model("llama")
    model.model.embed_tokens.weight.data[62:92] = torch.nan
    cpu, gpu = prepared(model, "llama"), on_gpu(model, "llama")
    for sampling in SAMPLINGS[:2]:
        expected, actual = ([found[:2] for found in history(decoder, sampling)] for decoder in (cpu, gpu))
        assert actual == expected and expected[0][1]


NCCL = """
import torch, torch.distributed as dist
from megadistill.decoding.token_steps import INTERVAL, Stepping
from megadistill.parallel import VocabShard
from tests.unit.test_decoding import V, make_model, prepared
from tests.unit.test_decoding_cuda import SAMPLINGS, assert_same, history, on_gpu
torch.cuda.set_device(0)
dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))
shard = VocabShard(0, V, V, dist.group.WORLD)
for dtype in (torch.float32, torch.bfloat16):
    model = make_model("llama", dtype)
    prepared(model, "llama")
    for sampling in SAMPLINGS:
        recorded = history(on_gpu(model, "llama", shard=shard), sampling)
        as_they_are = history(on_gpu(model, "llama", Stepping(INTERVAL, is_static=True), shard), sampling)
        assert_same(recorded, as_they_are, 0.0)
dist.barrier()
dist.destroy_process_group()
print("the same")
"""


@pytest.mark.skipif(not torch.distributed.is_nccl_available(), reason="no NCCL")
def test_collectives_are_recorded_too() -> None:
    """A group of one rank, in a process of its own; recordings are gone before the group is (else it would wait)."""
    done = subprocess.run([sys.executable, "-c", NCCL], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stdout.endswith("the same\n"), done.stderr[-3000:]


@pytest.mark.parametrize("variant", ["llama with grouped heads", "opt"])
def test_half_precision_reads_on(variant: str) -> None:
    """Ends of kept rows, many texts in one call, against the same rows read alone and whole."""
    model = make_model(variant)
    prepared(model, variant)
    model.load_state_dict({name: value * 0.1 ** (value.dim() > 1) for name, value in model.state_dict().items()})
    prefiller = on_gpu(model.bfloat16(), variant)
    state = prefiller.new_state([0] * 4, 8)
    texts = [prompt for prompt in PROMPTS if len(prompt) > 1]
    first = prefiller.read([PrefillChunk(row, 0, text[:1]) for row, text in enumerate(texts)], state)
    rest = prefiller.read([PrefillChunk(row, 1, text[1:]) for row, text in enumerate(texts)], state)
    for row, text in enumerate(texts):
        (alone,) = prefiller.read([PrefillChunk(0, 0, text)])
        actual = torch.cat([first[row], rest[row]])
        assert float((actual - alone).float().norm() / alone.float().norm()) < 0.02
