"""Tokens written by steps of fixed shapes, several between two looks, are those written one by one on the CPU."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megadistill.config.sampling import SamplingOptions
from megadistill.data.sample import Sample
from megadistill.decoding import static_step
from megadistill.decoding.decoder import PlanDecoder
from megadistill.decoding.hf_decoder import HFDecoder, make_decoder
from megadistill.decoding.rollout import Correction, RolloutState
from megadistill.decoding.sampling import NO_TOKEN, Drawer, Sampling
from megadistill.decoding.static_step import CudaRecorder, StaticSteps, stepping_on
from megadistill.decoding.token_steps import INTERVAL, Stepping, rounded_rows
from megadistill.generation.sources import teacher_mixed
from megadistill.models.families import FAMILIES
from megadistill.parallel.output_head import OutputHead
from megadistill.planning.counter import Counter
from megadistill.planning.ghost_mode import Ghost
from megadistill.planning.pretend_cuda import pretend_cuda
from tests.unit.test_decoding import CPU, SHARD, VARIANTS, WITHOUT_PLAN, make_model

PROMPTS = ((5, 6, 7, 8, 9, 10), (11,), (12, 13, 14), (15, 16, 17, 18), (19, 20), (21, 22, 23, 24, 25, 26))
SAMPLES = [Sample(3 * i, prompt) for i, prompt in enumerate(PROMPTS)]
LIMITS = [14, 9, 14, 1, 12, 11]
ENDS = frozenset(range(30, 42))  # an eighth of the classes, so that responses end anywhere
SAMPLINGS = [
    Sampling(7, 0.0), Sampling(7),
    Sampling(8, 0.7, SamplingOptions(top_k=9)), Sampling(9, 1.3, SamplingOptions(top_p=0.9)),
]  # fmt: skip
ROUNDED: list[Callable[[int, int], int]] = [
    rounded_rows, lambda active, slots: active,
    lambda active, slots: slots, lambda active, slots: min(active + 1, slots),
]  # fmt: skip


class ByHand:
    """A recorder whose recordings run the step; counts what is recorded and replayed."""

    def __init__(self, device: torch.device) -> None:
        self.run = lambda step: step()
        self.recorded = self.replayed = 0

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            step()

        return replay


def decoder_of(model: Any, variant: str, stepping: Stepping | None) -> PlanDecoder | HFDecoder:
    family = FAMILIES[VARIANTS[variant][0]]
    return make_decoder(model, family.plan(model), SHARD, CPU, stepping=stepping)


def prepared_model(variant: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    model: Any = make_model(variant, dtype, **more)
    family = FAMILIES[VARIANTS[variant][0]]
    if family.prepare is not None:
        family.prepare(model)
    return model


def history(decoder: PlanDecoder | HFDecoder, sampling: Sampling, samples: list[Sample] = SAMPLES) -> list[Any]:
    """Texts, ends without a distribution, and hidden states of writing and of two rounds of corrections."""
    limits = LIMITS[: len(samples)]
    state = RolloutState(decoder, samples, limits=limits, eos_ids=ENDS, sampling=sampling, keep_hidden=True)
    state.write(0)
    found: list[Any] = []
    for number in range(3):
        texts = state.responses()
        hidden = [state.hidden(example).clone() for example in range(len(samples))]
        found.append((texts, dict(state.nonfinite), hidden))
        places = [(example, (number + 2 * example) % 7) for example in range(len(samples)) if example != number]
        state.rewrite([Correction(i, at, 50 + i) for i, at in places if at < len(texts[i])], 1 + number, {60})
    return found


def assert_same(actual: list[Any], expected: list[Any], close: float) -> None:
    for (texts, nonfinite, hidden), (their_texts, theirs, their_hidden) in zip(actual, expected, strict=True):
        assert texts == their_texts and nonfinite == theirs
        for ours, other in zip(hidden, their_hidden, strict=True):
            torch.testing.assert_close(ours, other, rtol=close, atol=close, equal_nan=True)


@pytest.fixture(scope="module")
def llama() -> dict[torch.dtype, tuple[Any, list[list[Any]]]]:
    """By type: a model, and what it writes one token at a time with each sampling."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = prepared_model("llama with grouped heads", dtype)
        one_by_one = decoder_of(model, "llama with grouped heads", None)
        with sdpa_kernel(SDPBackend.MATH):
            found[dtype] = (model, [history(one_by_one, sampling) for sampling in SAMPLINGS])
    return found


@pytest.mark.parametrize("interval", range(1, INTERVAL + 1))
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 0.01)])
def test_every_interval_and_rounding(llama: Any, interval: int, dtype: torch.dtype, close: float) -> None:
    """Ends inside intervals, joining examples, kept caches, prompts of unequal length; all pairs of the two lists.

    In half precision with a kernel that computes in float32: the usual one rounds by the number of columns.
    """
    model, expected = llama[dtype]
    lengths = {len(text) for texts, *_ in expected[1] for text in texts}
    assert len(lengths) > 4, "responses end in many places"
    for number, rounded in enumerate(ROUNDED):
        which = (number + interval) % len(SAMPLINGS)
        stepping = Stepping(interval, is_static=True, rounded=rounded, recorder=ByHand if number % 2 else None)
        decoder = decoder_of(model, "llama with grouped heads", stepping)
        with sdpa_kernel(SDPBackend.MATH):
            actual = history(decoder, SAMPLINGS[which])
        assert_same(actual, expected[which], close)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family(variant: str) -> None:
    """Learned and rotary positions, biases, norms of heads; and forward passes of families, several at a time."""
    model = prepared_model(variant)
    expected = history(decoder_of(model, variant, None), SAMPLINGS[1])
    decoder = decoder_of(model, variant, Stepping(3, is_static=True))
    assert isinstance(decoder, HFDecoder) == (variant in WITHOUT_PLAN)
    assert_same(history(decoder, SAMPLINGS[1]), expected, 1e-4)


@pytest.mark.parametrize("prompts", [((5, 6),) * 3, ((5,),), ((5, 6, 7, 8, 9), (6,), (7, 8))])
@pytest.mark.parametrize("is_static", [True, False])
def test_every_first_column(llama: Any, prompts: tuple[tuple[int, ...], ...], is_static: bool) -> None:
    """No example that begins later, one alone, and many columns before an example."""
    model, samples = llama[torch.float32][0], [Sample(9 - i, prompt) for i, prompt in enumerate(prompts)]
    expected, actual = (
        history(decoder_of(model, "llama with grouped heads", stepping), SAMPLINGS[1], samples)
        for stepping in (None, Stepping(5, is_static=is_static))
    )
    assert_same(actual, expected, 1e-4)


def test_what_is_not_finite_ends_a_response_and_touches_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its columns are overwritten after a correction before it, and attended to after one behind it."""
    model = prepared_model("llama")
    model.model.embed_tokens.weight.data[62:92] = torch.nan
    for sampling in SAMPLINGS[:2]:
        expected = history(decoder_of(model, "llama", None), sampling)
        assert expected[0][1] and len(expected[-1][1]) > 2, "there are such responses"
        for interval in (1, 4, 8):
            actual = history(decoder_of(model, "llama", Stepping(interval, is_static=True)), sampling)
            assert_same(actual, expected, 1e-4)
    monkeypatch.setattr(StaticSteps, "forget", lambda *_: None)
    with pytest.raises(AssertionError):
        assert_same(history(decoder_of(model, "llama", Stepping(8, is_static=True)), sampling), expected, 1e-4)


class NoHostReads(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuses what a recording could not do: to read what tensors hold, or to make them from the host's numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("variant", ["llama", "opt", "qwen3"])
def test_a_step_reads_nothing_on_the_host(variant: str, sampling: Sampling) -> None:
    decoder, found = decoder_of(prepared_model(variant), variant, Stepping(4, is_static=True)), []
    numbers = torch.full((4, 2), 0.4, dtype=torch.float64)
    for num_steps in (4, 3):
        state = decoder.new_state([0, 1], 16)
        decoder.prefill(state, [[5, 6, 7], [8, 9]])
        steps = decoder.steps(state, Drawer(SHARD, sampling, 2), keep_hidden=True)
        assert isinstance(steps, StaticSteps)
        steps.run(torch.tensor([5, 6]), 3, numbers[:num_steps], num_steps)
        if num_steps == 3:
            steps._numbers[3] = 0.4
            with NoHostReads():
                steps._step(2)
        found.append(steps._drawn.tolist())
    assert found[0] == found[1] and NO_TOKEN not in found[0][3]


def test_kernels_of_a_recorded_step() -> None:
    """In half precision, as on a GPU: a bar, which may be lowered."""
    counts, counter = [], Counter()
    for num_layers in (1, 2):
        model = prepared_model("llama", torch.bfloat16, num_hidden_layers=num_layers)
        with Ghost(counter), pretend_cuda(counter, 2**34) as device:
            plan = FAMILIES["llama"].plan(model)
            assert plan is not None
            head = OutputHead(model.lm_head.weight, None, SHARD)
            decoder = PlanDecoder(plan, device, head, stepping=Stepping(2, is_static=True))
            state = decoder.new_state([0, 1], 16)
            steps = decoder.steps(state, Drawer(SHARD, SAMPLINGS[1], 2), keep_hidden=True)
            steps.run(torch.tensor([5, 6]), 3, torch.full((1, 2), 0.4, dtype=torch.float64), 1)
            before = counter.tally.copy()
            assert isinstance(steps, StaticSteps)
            steps._step(2)
            counts.append(counter.since(before).operations)
    layer = counts[1] - counts[0]
    assert layer <= 13 and counts[0] - layer <= 27


def test_recordings_are_made_once_for_each_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """After two steps as they are; the fewer examples are left, the narrower the step."""
    model, recorders, rows = prepared_model("llama"), [], []

    def recorder(device: torch.device) -> ByHand:
        recorders.append(ByHand(device))
        return recorders[-1]

    real = StaticSteps._step

    def step(self: StaticSteps, number: int) -> None:
        rows.append(number)
        real(self, number)

    monkeypatch.setattr(StaticSteps, "_step", step)
    decoder = decoder_of(model, "llama", Stepping(4, is_static=True, recorder=recorder))
    state = RolloutState(decoder, SAMPLES, limits=[30, 2, 20, 9, 2, 2], eos_ids=frozenset(), sampling=SAMPLINGS[1])
    state.write(0)
    (made,) = recorders
    assert [len(text) for text in state.responses()] == [30, 2, 20, 9, 2, 2]
    # 6 and 3 examples for 4 steps each, and 4 more (3), then 2 until the 20th, 1 until the 30th token.
    assert [(n, len(list(group))) for n, group in itertools.groupby(rows)] == [(6, 4), (4, 4), (2, 12), (1, 9)]
    assert made.recorded == 4 and made.replayed == len(rows) - 2 * 4


def test_rounded_rows() -> None:
    rounded = [rounded_rows(active, 64) for active in range(1, 65)]
    assert sorted(set(rounded)) == [1, 2, 4, 8, 16, 24, 32, 48, 64]
    assert all(active <= rows for active, rows in enumerate(rounded, start=1))
    assert [rounded_rows(active, 5) for active in range(1, 6)] == [1, 2, 4, 4, 5]


def test_a_device_says_how_tokens_are_written() -> None:
    cuda = torch.device("cuda")
    assert stepping_on(CPU) == stepping_on(CPU, cuda_graphs=False) == Stepping(1)
    assert stepping_on(cuda) == Stepping(INTERVAL, is_static=True, recorder=CudaRecorder)
    assert stepping_on(cuda, cuda_graphs=False) == Stepping(INTERVAL)


class _Cuda:
    """As much of CUDA's graphs and streams as a recording on the CPU needs. Recording runs the step, unlike CUDA's."""

    captures: list[Any] = []

    def capture_begin(self, pool: Any, **options: Any) -> None:
        self.captures.append((pool, options))

    def capture_end(self) -> None: ...

    def replay(self) -> None: ...

    def pool(self) -> str:
        return "pool"

    def wait_stream(self, _: Any) -> None: ...


def test_graphs_share_memory_and_do_not_keep_their_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else caches would wait for the garbage collector: they are most of what a rollout holds."""
    model = prepared_model("llama")
    for name in ("CUDAGraph", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: _Cuda())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    static_step._stream.cache_clear()
    monkeypatch.setattr(_Cuda, "captures", [])
    decoder = decoder_of(model, "llama", Stepping(1, is_static=True, recorder=CudaRecorder))
    state = decoder.new_state([0, 1], 32)
    steps = decoder.steps(state, Drawer(SHARD, SAMPLINGS[0], 2), keep_hidden=False)
    decoder.prefill(state, [[5, 6, 7], [8, 9]])
    for tokens in ([5, 6], [7]):
        for column in range(3, 8):
            steps.run(torch.tensor(tokens), column, None, 1)
    first, second = _Cuda.captures
    assert first == (None, {"capture_error_mode": "thread_local"}) and second == ("pool", first[1])
    static_step._stream.cache_clear()
    kept = weakref.ref(state)
    gc.disable()
    try:
        del state, steps
        assert kept() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("device", "cuda_graphs"), [("cuda", True), ("cuda", False), ("cpu", True)])
def test_a_mixture_says_that_its_steps_are_not_recorded(
    device: str, cuda_graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(teacher_mixed, "get_logger", lambda rank, component: SimpleNamespace(info=said.append))
    config = SimpleNamespace(generation=SimpleNamespace(cuda_graphs=cuda_graphs))
    context = SimpleNamespace(device=torch.device(device), rank=0)
    inputs: Any = SimpleNamespace(config=config, context=context, student=None, teacher=object())
    teacher_mixed.TeacherMixed.build(inputs)
    assert ["cuda_graphs=true has no effect" in line for line in said] == [True] * (device == "cuda" and cuda_graphs)
