"""Dry runs: what a ghost computes and what it does not, owners of memory, decoding that is counted, large worlds."""

from __future__ import annotations

import dataclasses
import functools
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megadistill.decoding.linear import Norm
from megadistill.decoding.plan import NormPlan
from megadistill.decoding.products import is_packable
from megadistill.errors import MegadistillError, TopologyError
from megadistill.losses.fused import chunk_size
from megadistill.parallel.vocab import VocabShard
from megadistill.planning.case import Models
from megadistill.planning.counter import Counter, Counting
from megadistill.planning.dry_run import dry_run, dry_run_in_process, step_use
from megadistill.planning.ghost_mode import Ghost
from megadistill.planning.owners import OWNERS
from megadistill.planning.pretend_cuda import pretend_cuda
from megadistill.planning.use import PHASES, StepUse
from tests.support.planning import PROMPT, RESPONSE, Layout, forked, ghost, settings, write_models

TP2, ALONE = Layout(2, 2, 3), Layout(1, 1, 3, "bf16")
GPU_MEMORY = 2**34


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@functools.cache
def known(models: Path, layout: Layout, like_gpu: bool = False) -> StepUse:
    """The dry run of a layout, which several tests look at."""
    return ghost(models, layout, like_gpu=like_gpu, gpu_memory=GPU_MEMORY)


@pytest.fixture(scope="module")
def use(models: Path) -> StepUse:
    return known(models, TP2)


# What a ghost computes.


@pytest.fixture
def counter() -> Iterator[Counter]:
    counter = Counter()
    with Ghost(counter):
        yield counter


def test_shapes_and_types_are_those_of_a_real_computation(counter: Counter) -> None:
    def compute() -> list[torch.Tensor]:
        weight = torch.zeros(300, 70, dtype=torch.bfloat16, requires_grad=True)
        x = torch.ones(4, 50, 70, dtype=torch.bfloat16)
        y = (x @ weight.T).float().softmax(-1)
        y.mean().backward()
        mask = torch.arange(50) < 20
        assert weight.grad is not None
        return [y, weight.grad, y[:, mask], y.argmax(-1), y.transpose(0, 1).contiguous(), y.topk(5, -1)[1], y > 2]

    ghosts = compute()
    with torch.utils._python_dispatch._disable_current_modes():
        real = compute()
    assert [(t.shape, t.dtype, t.stride()) for t in ghosts] == [(t.shape, t.dtype, t.stride()) for t in real]


def test_integers_and_single_numbers_are_computed(counter: Counter) -> None:
    assert (torch.arange(5000) * 2).sum() == 5000 * 4999
    step = torch.tensor(0.0)
    step += 1
    assert float(step * 3) == 3.0


def test_what_is_unknown_is_finite(counter: Counter) -> None:
    x = torch.empty(100, 1000).log() * float("nan")
    assert bool(x.isfinite().all()) and not bool(x.isnan().any())
    assert float(x.sum()) == 1.0 and x.sum(1)[:3].tolist() == [1.0] * 3


def test_large_floats_take_no_memory(counter: Counter) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    x = torch.zeros(2**28)
    y = (x * 2 + torch.randn(2**28)).normal_()
    assert counter.live == 2 * 2**30
    del x, y
    assert counter.live == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB; they would be three million


def test_what_depends_on_floats_is_refused(counter: Counter) -> None:
    with pytest.raises(MegadistillError, match="a dry run cannot know the result of aten::nonzero"):
        torch.rand(10).nonzero()


# What is counted.


def test_memory_is_what_is_alive_at_the_fullest_moment() -> None:
    counter = Counter()
    with Counting(counter):
        kept = torch.zeros(1000)
        with counter.phase("train"):
            for _ in range(3):
                torch.zeros(2**20) + 1
        with counter.phase("optimizer"):
            kept.view(10, 100).t()
    phases = {phase.name: phase for phase in counter.phases()}
    assert phases["train"].peak == 4096 + 2 * 4 * 2**20 and phases["optimizer"].peak == 4096  # 4,000 bytes in blocks
    assert phases["train"].operations == 6 + 1  # what comes before a phase is its own
    assert phases["optimizer"].operations == 0  # views are no launches
    assert sum(phases["train"].owners.values()) == phases["train"].peak


def test_products_are_counted_forward_and_backward() -> None:
    counter = Counter()
    with Counting(counter), counter.phase("train"):
        weight = torch.ones(20, 30, requires_grad=True)
        (torch.ones(10, 30, requires_grad=True) @ weight.T).sum().backward()
        query = torch.ones(2, 3, 8, 16, requires_grad=True)
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert counter.phases()[0].flops == 3 * 2 * 10 * 20 * 30 + 2 * 2 * 2 * 3 * 8 * 8 * 16


@pytest.mark.parametrize("is_ghost", [False, True])
def test_products_are_counted_however_they_are_written(is_ghost: bool) -> None:
    """In place, into a tensor, joined with a sum, and as inference mode dispatches them: in one piece."""
    counter, x, weight = Counter(), torch.ones(10, 30), torch.ones(20, 30)
    y, total = torch.empty(10, 20), torch.zeros(10, 20)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    onednn = torch.ops.mkldnn._linear_pointwise
    linear, onto = torch.nn.functional.linear, total[None]
    products = [
        lambda: onednn(x, packed, None, "none", [], ""),
        lambda: onednn(x, packed, weight[:, 0], "none", [], ""),
        lambda: onednn.binary(x, total, packed, None, "add"),
        lambda: torch.mm(x, weight.T, out=y),
        lambda: total.addmm_(x, weight.T),
        lambda: x @ weight.T,
        lambda: linear(x, weight),
        lambda: linear(x, weight, weight[:, 0]),
        lambda: torch.baddbmm(onto, x[None], weight.T[None]),
        lambda: onto.baddbmm_(x[None], weight.T[None]),
    ]
    for mode in (torch.inference_mode, torch.no_grad):
        with Ghost(counter) if is_ghost else Counting(counter), mode():
            for i, product in enumerate(products):
                before = counter.tally.copy()
                product()
                assert counter.since(before).flops == 2 * 10 * 20 * 30, (mode, i)


def test_attention_of_decoding_is_counted() -> None:
    counter, query = Counter(), torch.ones(2, 3, 8, 16)
    with Counting(counter), torch.inference_mode():
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert counter.tally.flops == 2 * 2 * 2 * 3 * 8 * 8 * 16


def test_owners_are_what_they_say(models: Path, use: StepUse) -> None:
    assert {owner for phase in use.phases for owner in phase.owners} <= set(OWNERS)
    assert [phase.name for phase in use.phases] == list(PHASES)
    rollout = use.phases[0]
    rows, columns, heads, head_dim, layers = 4, PROMPT + RESPONSE, 12 // 2, 16, 2
    # Both are there at once where the teacher reads; the student's alone while it writes.
    assert use.phases[1].owners["kv cache"] == 2 * layers * 2 * rows * heads * columns * head_dim * 4
    assert use.resident["optimizer states"] == pytest.approx(3 * use.resident["gradients"], rel=0.05)
    bucket = 4 * Models.of(settings(models, TP2)).student.size
    assert use.resident["reduce bucket"] == -(-bucket // 512) * 512
    assert use.resident["teacher weights"] > use.resident["student weights"] > 0
    assert sum(use.resident.values()) < rollout.peak < use.peak


# Decoding.


def test_plain_sft_has_no_phase_of_a_teacher(models: Path) -> None:
    sft = (("generation", {"mode": "dataset"}), ("loss", {"dac_kl": 0.0, "span": 0.0}))
    assert [phase.name for phase in ghost(models, Layout(1, 1, 0, more=sft)).phases] == ["train", "optimizer"]


@pytest.mark.parametrize(("layout", "like_gpu"), [(TP2, False), (ALONE, True)], ids=str)
def test_counted_decoding_is_that_of_all_steps(models: Path, layout: Layout, like_gpu: bool) -> None:
    some = known(models, layout, like_gpu)
    assert some == ghost(models, layout, like_gpu=like_gpu, gpu_memory=GPU_MEMORY, skips_decoding=False)
    first_error = int(RESPONSE * 0.5 / 4)
    assert some.decode_steps == (RESPONSE - 1) + (RESPONSE - 1 - first_error)


def test_some_decoding_steps_do_not_run(models: Path) -> None:
    steps: list[tuple[int, int]] = forked(_decoding_steps, settings(models, TP2))
    for made, run in steps:
        assert run < made


def _decoding_steps(config: Any) -> list[tuple[int, int]]:
    found = []

    def inspect(components: Any) -> None:
        writer = components.source._inputs.student
        found.append((writer.num_steps, writer.num_run - 4))  # two of each step before

    dry_run(
        config, rank=0, world_size=2, like_gpu=False, gpu_memory=0, prompt_tokens=PROMPT, response_tokens=RESPONSE,
        inspect=inspect,
    )  # fmt: skip
    return found


def test_a_short_first_step_prepares_as_a_long_one(models: Path, use: StepUse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megadistill.planning.counted_step._WARM_UP", RESPONSE)
    assert ghost(models, TP2) == use


# As on a GPU.


def test_a_gpu_makes_other_choices(models: Path) -> None:
    as_cpu, as_gpu = known(models, ALONE), known(models, ALONE, True)
    cpu, gpu = ({phase.name: phase for phase in use.phases} for use in (as_cpu, as_gpu))
    assert gpu["rollout"].operations < 0.8 * cpu["rollout"].operations  # decoding steps are recorded and replayed
    assert gpu["rollout"].owners["activations"] < cpu["rollout"].owners["activations"]  # no float32 copy of the head
    assert gpu["train"].operations <= cpu["train"].operations  # no blocks that fit a cache
    assert [phase.traffic for phase in as_cpu.phases] == [phase.traffic for phase in as_gpu.phases]
    assert any("NCCL" in line for line in as_gpu.assumptions)
    unrecorded = dataclasses.replace(ALONE, more=(("generation", {"cuda_graphs": False}),))
    without = {p.name: p for p in ghost(models, unrecorded, like_gpu=True, gpu_memory=2**34).phases}
    assert gpu["rollout"].operations < 0.75 * without["rollout"].operations


def test_only_this_package_takes_tensors_for_a_gpus() -> None:
    counter, weight = Counter(), torch.nn.LayerNorm(64)
    with Ghost(counter), pretend_cuda(counter, 2**34) as device:
        x = torch.empty(1000, 64, device=device)
        assert x.device.type == "cpu" and not x.is_cuda
        before = counter.tally.copy()
        Norm(NormPlan(weight, is_rms=True, eps=1e-5))(x)
        assert counter.since(before).operations == 1  # as on CUDA; on CPUs it is several
        assert not is_packable(x) and chunk_size("auto", VocabShard(0, 1000, 1000), x.device) > 0
    assert is_packable(x)


def test_what_is_computed_again_makes_the_same_choices(models: Path) -> None:
    stored, recomputed = (known(models, dataclasses.replace(ALONE, checkpoints=c), True) for c in (False, True))
    flops = [use.phases[-2].flops for use in (stored, recomputed)]
    assert 1.1 * flops[0] < flops[1] < 1.35 * flops[0]


def test_a_recorded_graph_is_one_launch_with_all_that_was_recorded() -> None:
    counter = Counter()
    with Ghost(counter), pretend_cuda(counter, 2**34), counter.phase("rollout"):
        x, graph = torch.empty(100, 100), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = (x @ x).relu() @ x
        graph.replay()
        graph.replay()
        del y
    rollout = counter.phases()[0]
    assert (rollout.operations, rollout.flops) == (2, 2 * 2 * 2 * 100**3)


# Large worlds.


def test_every_parameter_has_one_owner_on_1024_ranks(models: Path) -> None:
    """ZeRO-3 cuts each shard into equal runs, of which the last is shorter: asked of two ranks."""
    more = (("train", {"global_batch_size": 512, "micro_batch_size": 1}),)
    layout = dataclasses.replace(TP2, world_size=1024, more=more)
    for rank in (512, 1023):
        shards, runs = forked(_runs, settings(models, layout), rank)
        tp_rank, dp_rank = rank % 2, rank // 2
        assert len(shards) > 10
        for name, (shape, tp_dim, numel) in shards.items():
            length = -(-numel // 512)
            expected = (dp_rank * length, min(length, numel - dp_rank * length))
            assert runs.get(name) == (expected if expected[1] > 0 else None), (name, shape, tp_dim, tp_rank)
    # By that rule all ranks' runs together are every element of a shard once.
    for _, _, numel in shards.values():
        length = -(-numel // 512)
        owned = [range(i * length, min(numel, (i + 1) * length)) for i in range(512)]
        assert [x for run in owned for x in run] == list(range(numel))


def _runs(config: Any, rank: int) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """Name -> (whole shape, dimension that is sharded, elements of the shard), and the run of it that the rank owns."""
    from megadistill.engines.local_state import local_parts

    found: list[Any] = []

    def inspect(components: Any) -> None:
        student = components.student
        specs, tp_rank = student.shard_specs, components.context.tp_rank
        shapes = {name: spec.shard_shape(tp_rank) for name, spec in specs.items()}
        shards = {name: (spec.shape, spec.dim, torch.Size(shapes[name]).numel()) for name, spec in specs.items()}
        found.append((shards, {part.name: (part.start, part.numel) for part in local_parts(student.engine)}))

    dry_run(
        config, rank=rank, world_size=1024, like_gpu=False, gpu_memory=0, prompt_tokens=4, response_tokens=4,
        inspect=inspect,
    )  # fmt: skip
    shards, runs = found[0]
    return shards, runs


# A process of its own.


def test_a_process_of_its_own_gives_the_same(models: Path, use: StepUse) -> None:
    said: list[str] = []
    found = dry_run_in_process(
        settings(models, TP2), progress=said.append, rank=0, world_size=2, like_gpu=False, gpu_memory=0,
        prompt_tokens=PROMPT, response_tokens=RESPONSE,
    )  # fmt: skip
    assert found == use == step_use(use.as_dict())
    assert said == ["building the engines", "the first steps, in short", "the step that is counted"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 2}, "rank 2 does not exist among 2 processes"),
        ({"world_size": 5}, "a tensor-parallel size of 2 does not divide the number of processes, 5"),
        ({"response_tokens": 9}, "12 prompt and 9 response tokens are more than data.max_tokens=20 together"),
        ({"response_tokens": 1}, "rows of 12 prompt and 1 response tokens"),
    ],
)
def test_wrong_questions_have_one_line(models: Path, changes: dict[str, int], message: str) -> None:
    arguments: dict[str, Any] = {"rank": 0, "world_size": 2, "like_gpu": False, "gpu_memory": 0}
    arguments |= {"prompt_tokens": PROMPT, "response_tokens": RESPONSE} | changes
    with pytest.raises(MegadistillError, match=message) as caught:
        dry_run(settings(models, TP2), **arguments)
    assert "\n" not in str(caught.value)


def test_errors_of_the_process_are_those_of_the_dry_run(models: Path) -> None:
    with pytest.raises(MegadistillError, match="rank 7 does not exist among 2 processes"):
        dry_run_in_process(
            settings(models, TP2), rank=7, world_size=2, like_gpu=False, gpu_memory=0, prompt_tokens=1,
            response_tokens=2,
        )  # fmt: skip


def test_a_rank_beyond_the_world_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(TopologyError):
        dry_run(None, rank=1, world_size=1, like_gpu=False, gpu_memory=0, prompt_tokens=1, response_tokens=2)  # type: ignore[arg-type]
