"""Optimizer and teacher that wait in host memory: the same numbers bit for bit, and their storage is really freed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megadistill.engines.host_memory import HostMemory
from megadistill.models.shards import MASTER
from tests.support.engines import make_student, on_grid, train_step, write_config
from tests.support.preload import preload
from tests.support.spawn import run_ranks


def test_views_are_right_after_a_stay_in_host_memory() -> None:
    whole = torch.arange(12.0)
    view, other = whole[4:8], nn.Parameter(torch.ones(3))
    new: list[torch.Tensor] = []
    memory = HostMemory(lambda: [whole, view, other, *new], writable=True)
    assert memory.num_bytes == 15 * 4
    assert whole.untyped_storage().nbytes() == other.untyped_storage().nbytes() == 0
    with memory.present([view]):
        assert other.untyped_storage().nbytes() == 0
        with memory.present():
            assert view.tolist() == [4.0, 5.0, 6.0, 7.0] and other.tolist() == [1.0] * 3
            whole.mul_(2)
            new.append(torch.full((2,), 3.0))
        assert view.tolist() == [8.0, 10.0, 12.0, 14.0]  # still used by the first
    assert whole.untyped_storage().nbytes() == new[0].untyped_storage().nbytes() == 0
    with memory.present([other, new[0]]):
        assert other.tolist() == [1.0] * 3 and new[0].tolist() == [3.0, 3.0]
        assert whole.untyped_storage().nbytes() == 0


def test_what_is_only_read_is_copied_once() -> None:
    weight = torch.arange(3.0)
    memory = HostMemory(lambda: [weight], writable=False)
    with memory.present():
        weight.zero_()  # no user may do that; it shows that nothing is copied back
    with memory.present():
        assert weight.tolist() == [0.0, 1.0, 2.0]


def _train(rank: int, path: Path, tp_size: int, cases: list[tuple[int, str]]) -> list[dict[bool, Any]]:
    """Per case, with and without a stay: losses, norms, snapshots in the middle and at the end, bytes of the state."""
    from megadistill.engines.local_state import optimizer_tensors

    context, found = on_grid(rank, tp_size), []
    for stage, dtype in cases:
        results: dict[bool, Any] = {}
        for offload in (False, True):
            torch.manual_seed(0)
            student = make_student(
                path, context, dtype=dtype, micro_batches=2, zero_stage=stage, offload=offload, optim={"eps": 1e-6}
            )
            numbers, middle = [], {}
            for step in range(3):
                numbers += [*train_step(student, 2, step, lr=1e-2), student.grad_norm]
                if step == 1:
                    middle = {key: run for key, (_, run) in student.snapshot().items()}
            alive = {tensor.untyped_storage().nbytes() for tensor in optimizer_tensors(student.engine)}
            waiting = 0 if student._state is None else student._state.num_bytes
            end = {key: run for key, (_, run) in student.snapshot().items()}
            results[offload] = (numbers, middle, end, alive, waiting)
            student.engine.destroy()
            del student, middle, end
        found.append(results)
    return found


@pytest.mark.parametrize(
    ("tp_size", "dp_size", "cases"),
    [
        (1, 2, [(1, "fp32"), (2, "bf16"), (3, "fp32")]),
        (1, 1, [(0, "fp32"), (0, "bf16"), (1, "bf16")]),
        (2, 1, [(3, "bf16")]),
    ],
)
def test_an_optimizer_in_host_memory_changes_no_bit(
    tmp_path: Path, tp_size: int, dp_size: int, cases: list[tuple[int, str]]
) -> None:
    preload()

    for results in run_ranks(_train, tp_size * dp_size, write_config(tmp_path), tp_size, cases):
        for case, result in zip(cases, results, strict=True):
            numbers, middle, end, alive, _ = result[False]
            same, middle_too, end_too, freed, waiting = result[True]
            assert numbers == same, case
            for ours, theirs in ((middle, middle_too), (end, end_too)):
                assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), case
            assert any(not torch.equal(middle[key], end[key]) for key in end)
            assert min(alive) > 0 and freed == {0}, case
            numel = sum(run.numel() for key, run in end.items() if key.startswith(f"{MASTER}/"))
            kinds = 2 if case == (0, "fp32") else 3  # there the float32 weights are those of the forward pass
            assert waiting >= 4 * kinds * numel / (tp_size * dp_size), case


def _read(rank: int, path: Path, tp_size: int, stages: list[int]) -> list[list[Any]]:
    """Per stage, without and with a stay: what is read layer by layer, by the engine's forward, decoded, and scored."""
    from megadistill.config.parallel import ZeroSection
    from megadistill.decoding.kv_cache import PrefillChunk
    from megadistill.engines.partitioned import EnginePrefiller, frozen_model
    from megadistill.models.loading import load_model

    context, found = on_grid(rank, tp_size), []
    chunks = [PrefillChunk(0, 0, [5, 6, 7]), PrefillChunk(1, 0, [8, 9, 10, 11])]
    for stage in stages:
        results = []
        for offload in (False, True):
            loaded = load_model(
                str(path), dtype="fp32", vocab_size=101, seed=0, attention="sdpa", where="teacher", rank=rank
            )
            zero = ZeroSection(param_persistence_threshold=50) if stage == 3 else None
            teacher = frozen_model(loaded, context, zero_stage=stage, dtype="fp32", zero=zero, offload=offload)
            weights = _waiting(teacher) if offload else []
            assert all(storage.nbytes() == 0 for storage in weights) and bool(weights) == offload
            seen = list(teacher.prefiller(1).read(chunks))
            seen += EnginePrefiller(teacher.engine, context.device, 1, teacher._brought_in).read(chunks)
            with teacher.head() as head:
                seen.append(head.weight.detach().clone())
                seen += teacher.prefiller(1).read(chunks)
            with teacher.decoder() as decoder:
                state = decoder.new_state([0], 4)
                hidden = decoder.prefill(state, [[5, 6, 7]])
                seen += [hidden, decoder.logits(hidden)]
                assert all(storage.nbytes() > 0 for storage in weights)
            assert all(storage.nbytes() == 0 for storage in weights)
            results.append([tensor.detach().clone() for tensor in seen])
            teacher.engine.destroy()
        found.append(results)
    return found


def _waiting(teacher: Any) -> list[torch.UntypedStorage]:
    from megadistill.engines.local_state import weight_tensors

    return [tensor.untyped_storage() for tensor in weight_tensors(teacher.module.parameters())]


@pytest.mark.parametrize(("tp_size", "dp_size", "stages"), [(1, 1, [3]), (1, 2, [3]), (2, 1, [1])])
def test_a_teacher_in_host_memory_reads_the_same(tmp_path: Path, tp_size: int, dp_size: int, stages: list[int]) -> None:
    preload()

    for found in run_ranks(_read, tp_size * dp_size, write_config(tmp_path), tp_size, stages):
        for without, with_offload in found:
            assert len(without) == len(with_offload) == 9
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(without, with_offload, strict=True))
