"""The ``deepspeed`` section: merged over the generated configuration, and what the project decides is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from megadistill.config.deepspeed import OWNED
from megadistill.config.load import dump_resolved, load_config
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


COMMON: dict[str, Any] = dict(tp_size=1, dp_size=1, family=FAMILIES["llama"], device_type="cpu", num_elements=1000)


def student(config: Any, *, dtype: str = "fp32", zero_stage: int = 3, **more: Any) -> dict[str, Any]:
    options = {**COMMON, "zero": config.parallel.zero, "passed": config.deepspeed, **more}
    return student_config(config.optim, config.train, dtype=dtype, zero_stage=zero_stage, **options)


def test_it_is_merged_over_the_generated_configuration(tmp_path: Path) -> None:
    config = load(
        tmp_path, "deepspeed.zero_optimization.round_robin_gradients=true", "deepspeed.wall_clock_breakdown=true"
    )
    found = student(config)
    assert found["zero_optimization"]["stage"] == 3 and found["zero_optimization"]["round_robin_gradients"] is True
    assert found["wall_clock_breakdown"] is True
    assert "wall_clock_breakdown" not in student(config, passed={})


def test_what_deepspeed_does_not_take_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    config = load(tmp_path, "deepspeed.zero_optimization.round_robin_gradient=true")
    line = r"^deepspeed.zero_optimization.round_robin_gradient: Extra inputs .*did you mean round_robin_gradients\?$"
    with pytest.raises(ConfigError, match=line):
        student(config)


def test_it_survives_resolved_yaml(tmp_path: Path) -> None:
    config = load(tmp_path, "deepspeed.zero_optimization.sub_group_size=1000", "parallel.zero.reduce_bucket_size=7")
    dump_resolved(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == load_config(tmp_path / "resolved.yaml", is_record=True) == config


def test_buckets_and_overlap(tmp_path: Path) -> None:
    plain = load(tmp_path)
    zero = student(plain)["zero_optimization"]
    assert zero["reduce_bucket_size"] == 1000 and zero["overlap_comm"] is False
    assert student(plain, num_elements=10**10)["zero_optimization"]["reduce_bucket_size"] == 10**8
    assert student(plain, device_type="cuda")["zero_optimization"]["overlap_comm"] is True
    assert student(plain, device_type="cuda", zero_stage=0)["zero_optimization"]["overlap_comm"] is False
    set_ = load(
        tmp_path,
        "parallel.zero.overlap_comm=false",
        "parallel.zero.reduce_bucket_size=5",
        "parallel.zero.prefetch_bucket_size=0",
        "parallel.zero.max_reuse_distance=1",
        "parallel.zero.max_live_parameters=2",
        "parallel.zero.param_persistence_threshold=3",
    )
    zero = student(set_, device_type="cuda")["zero_optimization"]
    assert zero["overlap_comm"] is False and zero["reduce_bucket_size"] == 5
    names = ("prefetch_bucket_size", "max_reuse_distance", "max_live_parameters", "param_persistence_threshold")
    assert [zero[f"stage3_{name}"] for name in names] == [0, 1, 2, 3]
    common = {key: value for key, value in COMMON.items() if key not in ("dp_size", "num_elements")}
    teacher = teacher_config(zero_stage=3, dtype="fp32", zero=set_.parallel.zero, **common)
    assert teacher["zero_optimization"]["stage3_max_reuse_distance"] == 1
    # What DeepSpeed knows nothing of would be ignored by it.
    assert DeepSpeedZeroConfig(**zero).max_live_parameters == 2


def test_gradients_are_summed_in_float32_where_weights_are_bf16(tmp_path: Path) -> None:
    config = load(tmp_path)
    for stage in (1, 2, 3):
        wide = student(config, dtype="bf16", zero_stage=stage)
        assert wide["data_types"] == {"grad_accum_dtype": "fp32"} and wide["communication_data_type"] == "fp32"
    assert "data_types" not in student(config, dtype="bf16", zero_stage=0)
    narrow = load(tmp_path, "optim.gradient_dtype=bf16", "model.student.dtype=bf16")
    for found in (student(config), student(narrow, dtype="bf16")):
        assert "data_types" not in found and "communication_data_type" not in found


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["optim.gradient_dtype=bf16"], "optim.gradient_dtype=bf16 needs model.student.dtype=bf16"),
        (["parallel.zero_stage=1", "parallel.zero.prefetch_bucket_size=0"], "has an effect with parallel.zero_stage 3"),
        (["parallel.zero_stage=0", "parallel.zero.overlap_comm=true"], "with parallel.zero_stage 1, 2 or 3 only"),
        (["parallel.zero.overlap_com=true"], "did you mean parallel.zero.overlap_comm?"),
        (["parallel.offload=cpu"], "must be none | optimizer | teacher | both"),
        (["parallel.offload=both", "loss.dac_kl=0", "loss.span=0", "generation.mode=dataset"], "has no teacher"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path: Path, settings: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, *settings)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_the_record_of_an_earlier_run_is_read(tmp_path: Path) -> None:
    """Its keys in ``deepspeed`` are keys of their own now; in a user's file they are refused."""
    old = {
        "communication_data_type": "bf16",
        "wall_clock_breakdown": True,
        "zero_optimization": {
            "overlap_comm": True,
            "stage3_max_live_parameters": 5,
            "offload_optimizer": {"device": "cpu"},
            "round_robin_gradients": True,
        },
    }
    tree = load(tmp_path).model_dump(mode="json") | {"deepspeed": old}
    tree["parallel"] = {"tp_size": 2, "zero_stage": 3, "timeout_s": 60}
    file = tmp_path / "resolved.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    found = load_config(file, is_record=True)
    assert found.parallel.zero.overlap_comm is True and found.parallel.zero.max_live_parameters == 5
    assert found.parallel.offload == "optimizer" and found.parallel.tp_size == 2
    assert found.deepspeed == {"wall_clock_breakdown": True, "zero_optimization": {"round_robin_gradients": True}}
    with pytest.raises(ConfigError, match="is decided by"):
        load_config(file)


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
