"""What ``megadistill plan`` makes of its formulas: times, and the search for layouts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megadistill.config.load import load_config
from megadistill.planning.case import Case, Models
from megadistill.planning.compare import compare
from megadistill.planning.formulas import step_use
from megadistill.planning.needs import needs_of
from megadistill.planning.search import Candidate, changes, fits, nearest, sweep
from megadistill.planning.times import measured_factors, phase_times, step_seconds
from tests.support.large_pair import CONFIGS, GB, H100, LARGE, large_models, planned
from tests.support.runs import settings, write_assets


@pytest.fixture(scope="module")
def models() -> Models:
    return large_models()


def test_sweep_begins_with_the_fastest_that_fits(models: Models) -> None:
    case = planned(models, nodes=1)
    found = sweep(case, H100)
    assert len(found) > 20 and all(fits(candidate.case, candidate.use) for candidate in found)
    seconds = [step_seconds(phase_times(c.case, step_use(c.case), H100)) for c in found]
    assert seconds == sorted(seconds)
    assert {candidate.case.tp_size for candidate in found} == {1, 2, 4, 8}
    assert all(candidate.case.world_size == 8 for candidate in found)
    smaller = sweep(replace(case, gpu_memory=int(40 * GB)), H100)
    assert 0 < len(smaller) < len(found)


@pytest.mark.parametrize(
    ("settings", "memory_gb"),
    [
        (("model.gradient_checkpointing=false", "parallel.tp_size=2"), 50),
        (("train.micro_batch_size=32", "parallel.tp_size=8", "parallel.zero_stage=1"), 24),
        (("parallel.tp_size=1", "parallel.zero_stage=0", "train.micro_batch_size=1"), 80),
        (("parallel.tp_size=8",), 15),
    ],
)
def test_the_nearest_setting_fits(models: Models, settings: tuple[str, ...], memory_gb: float) -> None:
    case = planned(models, *settings, memory_gb=memory_gb)
    assert not fits(case, step_use(case))
    found = nearest(case, H100)
    assert found is not None
    named = changes(case, found.case)
    assert named
    again = case.with_settings({k: v for k, v in named.items() if not k.startswith("--")}, nodes=named.get("--nodes"))
    again.check()
    assert fits(again, step_use(again)) and again.world_size == found.case.world_size
    if "--nodes" not in named:  # nothing with fewer changes fits
        assert len(named) <= min(len(changes(case, candidate.case)) for candidate in _tried(case))


def _tried(case: Case) -> list[Candidate]:
    """Layouts of the same machines that fit, as ``nearest`` allows them."""
    config = case.config
    return [
        candidate
        for candidate in sweep(case, H100)
        if candidate.case.config.train.micro_batch_size <= config.train.micro_batch_size
        and candidate.case.zero_stage >= case.zero_stage
        and candidate.case.config.model.gradient_checkpointing >= config.model.gradient_checkpointing
    ]


def test_nothing_fits_a_watch(models: Models) -> None:
    assert nearest(planned(models, memory_gb=0.5), H100) is None


def test_a_comparison_names_what_differs(models: Models) -> None:
    use = step_use(planned(models))
    same = compare(use, use)
    assert all(row.ratio == 1 for row in same.rows) and "peak of train" in str(same)
    assert any("of tp in" in row.what for row in same.rows) and any("of dp in" in row.what for row in same.rows)
    alone = compare(use, replace(use, world_size=use.tp_size))  # its dp group has one rank
    assert not any("of dp in" in row.what for row in alone.rows)
    phases = [replace(p, peak=2 * p.peak) if p.name == "train" else p for p in use.phases]
    assert compare(use, replace(use, phases=tuple(phases))).worst_memory().what == "peak of train"


def test_times_follow_rates_and_links(models: Models) -> None:
    case = planned(models, "parallel.tp_size=2", "train.micro_batch_size=4")
    use = step_use(case)
    usual = phase_times(case, use, H100)
    assert usual["train"].dp > 3 * phase_times(replace(case, nodes=1, gpus_per_node=16), use, H100)["train"].dp
    faster = phase_times(case, use, replace(H100, bf16=2 * H100.bf16))
    assert faster["train"].products == pytest.approx(usual["train"].products / 2)
    eager = planned(models, "parallel.tp_size=2", "train.micro_batch_size=4", "generation.cuda_graphs=false")
    assert usual["rollout"].launches < 0.5 * phase_times(eager, step_use(eager), H100)["rollout"].launches
    slow = phase_times(case, use, H100, {"train": 2.0})
    assert slow["train"].seconds == pytest.approx(2 * usual["train"].seconds)


def test_rates_of_a_run_correct_the_times(tmp_path: Path) -> None:
    config = [f"run.dir={tmp_path}", *LARGE[1:], "parallel.tp_size=8"]
    from megadistill.config.load import dump_resolved

    loaded = load_config(CONFIGS / "base.yaml", config)
    dump_resolved(loaded, tmp_path / "resolved.yaml")
    (tmp_path / "summary.json").write_text(json.dumps({"processes": 16}), encoding="utf-8")
    case = Case.of(loaded, Models.of(loaded), nodes=2, gpus_per_node=8, gpu_memory=H100.memory)
    predicted = phase_times(case, step_use(case), H100)
    lines = [{"step": 1, "time/train_s": 99.0}, {"step": 2, "time/train_s": 99.0}]
    lines += [{"step": 3 + i, "time/train_s": 3 * predicted["train"].seconds} for i in range(3)]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert measured_factors(metrics, H100, 8) == {"train": pytest.approx(3)}


def test_doctor_needs_what_is_resident(tmp_path: Path) -> None:
    """The doctor's lower bounds are the planner's, for models of a run too."""
    write_assets(tmp_path)
    config = load_config(CONFIGS / "base.yaml", [f"run.dir={tmp_path}", *settings(tmp_path, "llama")])
    needs = needs_of(config, 2)
    case = Case.of(config, Models.of(config), nodes=1, gpus_per_node=2, gpu_memory=0)
    assert needs.tp_size == case.tp_size and needs.device_bytes == sum(step_use(case).resident.values())
    assert needs.checkpoint_bytes == 16 * case.models.student.size == 2 * needs.host_bytes
