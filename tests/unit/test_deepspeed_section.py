"""The ``deepspeed`` section: merged over the generated configuration, and what the project decides is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megadistill.config.deepspeed import OWNED
from megadistill.config.load import dump_resolved, load_config
from megadistill.config.schema import OptimSection, TrainSection
from megadistill.engines.ds_config import student_config, teacher_config
from megadistill.errors import ConfigError
from megadistill.models.families import FAMILIES

CONFIG = """
run: {dir: runs/x}
model: {teacher: {path: t}, student: {path: s}}
"""


def load(tmp_path: Path, *overrides: str) -> Any:
    file = tmp_path / "run.yaml"
    file.write_text(CONFIG, encoding="utf-8")
    return load_config(file, overrides)


def test_it_is_merged_over_the_generated_configuration(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "deepspeed.zero_optimization.overlap_comm=true",
        "deepspeed.zero_optimization.offload_optimizer.device=cpu",
        "deepspeed.wall_clock_breakdown=true",
    )
    common: dict[str, Any] = dict(zero_stage=3, tp_size=1, dtype="fp32", family=FAMILIES["llama"])
    student = student_config(OptimSection(), TrainSection(), dp_size=1, passed=config.deepspeed, **common)
    assert student["zero_optimization"]["stage"] == 3 and student["zero_optimization"]["overlap_comm"] is True
    assert student["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert student["zero_force_ds_cpu_optimizer"] is False and student["wall_clock_breakdown"] is True
    teacher = teacher_config(passed=config.deepspeed, **common)
    assert teacher["zero_optimization"]["overlap_comm"] is True
    assert "offload_optimizer" not in teacher["zero_optimization"]
    plain = student_config(OptimSection(), TrainSection(), dp_size=1, **common)
    assert plain["zero_optimization"]["overlap_comm"] is False and "zero_force_ds_cpu_optimizer" not in plain


def test_it_survives_resolved_yaml(tmp_path: Path) -> None:
    config = load(tmp_path, "deepspeed.zero_optimization.reduce_bucket_size=1000")
    dump_resolved(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(("key", "instead"), OWNED.items())
def test_what_the_project_decides_is_refused_with_the_key_to_use(tmp_path: Path, key: str, instead: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, f"deepspeed.{key}=1")
    assert f"command line: deepspeed.{key}" in str(caught.value) and instead in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("deepspeed.zero_optimizaton.stage=1", "did you mean zero_optimization?"),
        ("deepspeed.nonsense=1", "allowed: zero_optimization"),
        ("deepspeed=3", "must be a mapping"),
    ],
)
def test_what_deepspeed_would_ignore_is_refused(tmp_path: Path, setting: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load(tmp_path, setting)
