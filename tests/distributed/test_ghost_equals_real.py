"""The dry run of a step against the same step really computed under gloo, counted by the same counter."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadistill.planning.use import PhaseUse, StepUse
from tests.support.planning import Layout, ghosts, measure, write_models

HPZ = (("parallel", {"zero": {"hpz_partition_size": 2}}),)
MORE = (("generation", {"scrg": {"rounds": 2}}), ("loss", {"sft": 0.0}))
STUDENT = (("loss", {"gate_objective": "student"}),)
# World size -> layouts, measured one after the other in one launch. What their ranks are asked is rank 0's use, and the
# last rank's where the vocabulary is cut unevenly.
LAYOUTS = {
    1: [Layout(1, 1, 0), Layout(1, 1, 3, "bf16", checkpoints=True)],
    2: [
        Layout(2, 1, 1),
        Layout(2, 2, 1, "bf16"),
        Layout(2, 1, 2, "bf16", more=STUDENT),
        Layout(2, 1, 3, "bf16", "opt"),
        Layout(2, 2, 3, "fp32", "gpt2", more=STUDENT),
        Layout(2, 2, 3, "bf16", "gpt2", lora=4),
        Layout(2, 1, 2, "bf16", lora=4),
        Layout(2, 1, 3, "bf16", more=(("generation", {"mode": "teacher_mixed"}),)),
    ],
    3: [Layout(3, 3, 3), Layout(3, 3, 0, "bf16")],
    4: [
        Layout(4, 4, 3, "bf16"),
        Layout(4, 1, 3, more=HPZ),
        Layout(4, 2, 2),
        Layout(4, 2, 3, "fp32", "qwen3", True, MORE),
        Layout(4, 2, 3, "bf16", "qwen3", True, lora=4),
    ],
}
# Numbers that a library drops a moment earlier or later.
_SLACK_BYTES = 4096
# Strides of a result may differ from those of the CPU's kernels, and then a copy is made or not.
_SLACK_OPERATIONS = 0.005


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_dry_runs_use_what_real_steps_use(models: Path, world_size: int) -> None:
    """One launch for all layouts of a world size, and one process for all their dry runs."""
    layouts = LAYOUTS[world_size]
    asked = [(layout, rank) for layout in layouts for rank in ((0, world_size - 1) if layout.tp_size == 3 else (0,))]
    measured, dry = measure(models, layouts), ghosts(models, asked)
    for (layout, rank), use in zip(asked, dry, strict=True):
        _assert_same(use, measured[layouts.index(layout)][rank], f"{layout}, rank {rank}")


def test_the_layouts_cover_what_they_should() -> None:
    layouts = [layout for group in LAYOUTS.values() for layout in group]
    assert len(layouts) >= 12
    assert {layout.tp_size for layout in layouts} == {1, 2, 3, 4}
    assert {layout.world_size // layout.tp_size for layout in layouts} >= {1, 2, 4}
    assert {(layout.zero_stage, layout.dtype) for layout in layouts} == {
        (stage, dtype) for stage in range(4) for dtype in ("fp32", "bf16")
    }


def _assert_same(dry: StepUse, real: StepUse, where: str) -> None:
    assert (dry.source, real.source) == ("dry run", "measured")
    assert dry.resident == real.resident, where
    assert dry.decode_steps == real.decode_steps, where
    assert [phase.name for phase in dry.phases] == [phase.name for phase in real.phases], where
    for ours, theirs in zip(dry.phases, real.phases, strict=True):
        phase = f"{where}, {ours.name}"
        assert ours.traffic == theirs.traffic, phase
        assert ours.flops == theirs.flops, phase
        assert ours.operations == pytest.approx(theirs.operations, rel=_SLACK_OPERATIONS), phase
        assert abs(theirs.peak - ours.peak) <= _gloo_bytes(theirs) + _SLACK_BYTES, phase
        assert sum(ours.owners.values()) == ours.peak, phase


def _gloo_bytes(phase: PhaseUse) -> int:
    """What gloo holds of one call: its clone of an input, or a tensor that it drops a moment later."""
    return max((call.bytes for call in phase.traffic), default=0)
