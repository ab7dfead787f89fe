"""Secondary partitions (hpZ): the same numbers bit for bit, and gathering among few ranks where it can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megadistill.errors import MegadistillError
from tests.support.engines import fill_adapters, make_student, on_grid, train_step, write_config
from tests.support.spawn import run_ranks

# Every layer is released after its use, as in large models.
_RELEASED = {"param_persistence_threshold": 0, "max_reuse_distance": 0}


def _run(rank: int, path: Path, tp_size: int, sizes: list[int]) -> list[Any]:
    """Per size: numbers of a student and of a teacher, and how many ranks took part in each gathering of theirs."""
    import torch.distributed as dist
    from deepspeed.runtime.zero import partition_parameters

    from megadistill.config.parallel import ZeroSection
    from megadistill.decoding.kv_cache import PrefillChunk
    from megadistill.engines.gathered import gathered_parameters
    from megadistill.engines.partitioned import frozen_model
    from megadistill.models.loading import load_model

    context, found, members = on_grid(rank, tp_size), [], []
    gather = partition_parameters._dist_allgather_fn

    def counted(source: Any, target: Any, group: Any = None) -> Any:
        members.append(dist.get_world_size(group))
        return gather(source, target, group)

    partition_parameters._dist_allgather_fn = counted
    chunks = [PrefillChunk(0, 0, [5, 6, 7]), PrefillChunk(1, 0, [8, 9, 10, 11])]
    for size in sizes:
        zero, shared = ZeroSection(**_RELEASED, hpz_partition_size=size), {"where": "teacher", "rank": rank}
        torch.manual_seed(0)
        student = make_student(path, context, dtype="fp32", micro_batches=2, zero_stage=3, zero=zero)
        loaded = load_model(str(path), dtype="fp32", vocab_size=101, seed=1, attention="sdpa", **shared)
        teacher = frozen_model(loaded, context, zero_stage=3, dtype="fp32", zero=zero)
        numbers: list[Any] = []
        members.clear()
        for step in range(3):
            numbers += [*train_step(student, 2, step, lr=1e-2), student.grad_norm]
            with gathered_parameters([next(student.module.parameters())]):
                pass  # now it has a secondary partition, and the others have none
            with student.decoder() as decoder:  # reads weights between updates
                numbers += decoder.prefill(decoder.new_state([0], 4), [[5, 6, 7]]).flatten().tolist()
        by_student = list(members)
        members.clear()
        for _ in range(2):
            for hidden in teacher.prefiller(1).read(chunks):
                numbers += hidden.flatten().tolist()
        student.fill(_Snapshot(student), "weight")  # what a resumed run does
        numbers += train_step(student, 2, 0, lr=1e-2)
        found.append((numbers, by_student, list(members)))
        student.engine.destroy()
        teacher.engine.destroy()
    return found


class _Snapshot:
    """A source of weights: those of a student, whole and halved, which no secondary partition has seen."""

    info: dict[str, Any] = {}
    kinds = ("weight",)

    def __init__(self, student: Any) -> None:
        self._shapes = {name: spec.shape for name, spec in student.shard_specs.items()}

    def stream(self, parameters: Any) -> list[str]:
        return list(parameters)

    def read(self, kind: str, name: str, spec: Any, tp_rank: int, start: int, end: int) -> torch.Tensor:
        return torch.arange(start, end).remainder(17).sub(8).mul(0.01)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_secondary_partitions_change_no_bit(tmp_path: Path, tp_size: int) -> None:
    import deepspeed  # noqa: F401  imported once, before the forks

    dp_size = 4 // tp_size
    for without, with_them in run_ranks(_run, 4, write_config(tmp_path), tp_size, [1, 2]):
        assert with_them[0] == without[0]
        assert {*without[1], *without[2]} == {dp_size}
        if tp_size == 1:  # otherwise the two ranks are all that there are
            _assert_mostly_few(with_them[1], with_them[2])


def _assert_mostly_few(by_student: list[int], by_teacher: list[int]) -> None:
    assert set(by_student) == set(by_teacher) == {2, 4}
    assert by_teacher.count(2) >= by_teacher.count(4) and by_student.count(2) > by_student.count(4)


def _with_adapters(rank: int, path: Path, sizes: list[int]) -> list[list[float]]:
    """Per size: numbers of a student with adapters that writes before it trains, as after a resume."""
    from megadistill.config.parallel import ZeroSection

    context, found = on_grid(rank, 1), []
    for size in sizes:
        zero = ZeroSection(**_RELEASED, hpz_partition_size=size)
        student = make_student(path, context, dtype="fp32", micro_batches=2, zero_stage=3, zero=zero, lora={"r": 3})
        fill_adapters(student)
        numbers: list[float] = []
        for step in range(2):
            with student.decoder() as decoder:
                numbers += decoder.prefill(decoder.new_state([0], 4), [[5, 6, 7]]).flatten().tolist()
            numbers += [*train_step(student, 2, step, lr=1e-2), student.grad_norm]
        found.append(numbers)
        student.engine.destroy()
    return found


def test_they_are_made_of_the_base_and_not_of_merged_weights(tmp_path: Path) -> None:
    for without, with_them in run_ranks(_with_adapters, 2, write_config(tmp_path), [1, 2]):
        assert with_them == without


def _refused(rank: int, path: Path) -> str:
    from megadistill.config.parallel import ZeroSection

    zero = ZeroSection(hpz_partition_size=3)
    with pytest.raises(MegadistillError) as raised:
        make_student(path, on_grid(rank, 1), dtype="fp32", zero_stage=3, zero=zero)
    return str(raised.value)


def test_a_size_that_does_not_divide_the_ranks_is_refused(tmp_path: Path) -> None:
    for message in run_ranks(_refused, 2, write_config(tmp_path)):
        assert "over 3 ranks does not divide" in message and "allowed: 1, 2" in message
