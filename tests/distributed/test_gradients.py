"""Gradients of a bfloat16 student are summed in float32: over micro-batches and over data-parallel ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.engines import make_student, masters, on_grid, train_step, write_config
from tests.support.preload import preload
from tests.support.spawn import run_ranks

MICRO_BATCHES = 16


def _error(rank: int, path: Path, tp_size: int, stages: list[int], gradient_dtype: str) -> list[tuple[float, float]]:
    """ZeRO stage by stage: error of the summed gradient against its sum in float64, and of its norm, both relative."""
    import torch.distributed as dist

    from megadistill.parallel.collectives import all_reduce_sum

    context, errors = on_grid(rank, tp_size), []
    for stage in stages:
        optim = {"gradient_dtype": gradient_dtype}
        student = make_student(path, context, dtype="bf16", micro_batches=MICRO_BATCHES, zero_stage=stage, optim=optim)
        sums: dict[str, torch.Tensor] = {}
        for name, parameter in student.module.named_parameters():

            def note(gradient: torch.Tensor, name: str = name, sums: dict[str, torch.Tensor] = sums) -> None:
                sums[name] = sums.get(name, 0) + gradient.double().reshape(-1)

            parameter.register_hook(note)
        before = masters(student)
        train_step(student, MICRO_BATCHES)
        after = masters(student)
        numbers = torch.zeros(2, dtype=torch.float64)  # squares of error and gradient
        norm = torch.zeros(2, dtype=torch.float64)  # squares of whole parameters and of shards
        for name in sorted(sums):
            total = context.sum_over_dp(sums[name]) / student.loss_scale
            norm[int(student.shard_specs[name].dim is not None)] += total.square().sum()
            if name in before:
                (start, old), (_, new) = before[name], after[name]
                step = old.double() - new.double()
                found = step / (1 - step.abs())  # AdamW's first step with lr and epsilon 1 is g / (|g| + 1)
                expected = total[start : start + len(old)]
                numbers += torch.stack([(found - expected).square().sum(), expected.square().sum()])
        dist.all_reduce(numbers)
        norm[1:] = all_reduce_sum(norm[1:].clone(), context.tp_group)
        exact = float(norm.sum().sqrt())
        errors.append((float((numbers[0] / numbers[1]).sqrt()), abs(student.grad_norm - exact) / exact))
        student.engine.destroy()
    return errors


@pytest.mark.parametrize(("tp_size", "dp_size"), [(1, 3), (2, 1)])
def test_gradients_are_summed_in_float32(tmp_path: Path, tp_size: int, dp_size: int) -> None:
    """Three ranks, by which no binary number can be divided exactly, and two shards; every ZeRO stage."""
    preload()

    path = write_config(tmp_path)
    for rank_errors in run_ranks(_error, tp_size * dp_size, path, tp_size, [0, 1, 2, 3], "fp32"):
        for error, norm_error in rank_errors:
            assert error < 1e-6 and norm_error < 1e-5


def test_bfloat16_sums_are_what_they_were(tmp_path: Path) -> None:
    """The setting has an effect, and the test above could fail."""
    preload()

    for error, norm_error in run_ranks(_error, 1, write_config(tmp_path), 1, [0, 3], "bf16")[0]:
        assert 2e-3 < error < 1e-2 and norm_error < 1e-2


def _updates(rank: int, path: Path, stage: int, gradient_dtype: str) -> list[torch.Tensor]:
    """Updates of all weights from the same rows in sixteen micro-batches and in one."""
    context, updates = on_grid(rank, 1), []
    for rows in (1, MICRO_BATCHES):
        student: Any = make_student(
            path, context, dtype="bf16", micro_batches=MICRO_BATCHES // rows, zero_stage=stage,
            optim={"gradient_dtype": gradient_dtype},
        )  # fmt: skip
        before = masters(student)
        train_step(student, MICRO_BATCHES // rows, rows_a_pass=rows)
        updates.append(torch.cat([old - masters(student)[name][1] for name, (_, old) in before.items()]))
        student.engine.destroy()
    return updates


def test_the_number_of_micro_batches_hardly_matters(tmp_path: Path) -> None:
    preload()

    path = write_config(tmp_path)
    differences = {}
    for dtype in ("fp32", "bf16"):
        many, one = run_ranks(_updates, 1, path, 3, dtype)[0]
        differences[dtype] = float((many - one).norm() / one.norm())
    assert differences["fp32"] < differences["bf16"] / 2, differences


def test_stage_0_in_bfloat16_clips_as_stage_3(tmp_path: Path) -> None:
    """DeepSpeed's own norm is that of rank 0's shard there; and its first update is the first of AdamW's."""
    preload()

    path = write_config(tmp_path)

    def body(rank: int) -> list[tuple[float, float]]:
        context, found = on_grid(rank, 2), []
        for stage in (0, 3):
            student = make_student(path, context, dtype="bf16", zero_stage=stage, optim={"gradient_clipping": 0.5})
            before = student.snapshot()
            train_step(student, 1)
            step = [before[key][1] - run for key, (_, run) in student.snapshot().items() if key.startswith("master/")]
            found.append((student.grad_norm, float(torch.cat(step).norm())))
            student.engine.destroy()
        return found

    for found in run_ranks(body, 2):
        norms, steps = zip(*found, strict=True)
        assert norms[0] > 1 and max(norms) - min(norms) < 1e-4 * norms[0]
        assert max(steps) - min(steps) < 1e-4 * steps[0]


def test_a_gpu_gets_the_fused_adamw_from_the_same_state() -> None:
    """One and the same update from a state that a checkpoint filled, whichever AdamW the machine has."""
    from megadistill.config.optim import OptimSection
    from megadistill.engines.local_state import _adamw_state
    from megadistill.engines.student import _adamw

    updated = []
    for device in ("cpu", "cuda"):
        model = torch.nn.Linear(8, 8)
        torch.nn.init.constant_(model.weight, 0.5)
        optimizer = _adamw(model, OptimSection(weight_decay=0.1), torch.device(device))
        assert bool(optimizer.defaults["fused"]) == (device == "cuda")
        for parameter in model.parameters():
            state = _adamw_state(optimizer, parameter)
            state["step"].fill_(7)
            state["exp_avg"].fill_(0.2)
            parameter.grad = torch.full_like(parameter, 0.3)
        optimizer.step()
        assert float(model.weight.detach().max()) == 0.5  # not allowed yet
        optimizer.is_allowed = lambda: True
        optimizer.step()
        assert {int(state["step"]) for state in optimizer.state.values()} == {8}
        updated.append(model.weight.detach().clone())
    assert float((updated[0] - 0.5).abs().max()) > 1e-5
    assert torch.allclose(updated[0], updated[1], rtol=1e-6, atol=0)
