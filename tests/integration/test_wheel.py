"""An installed wheel does the whole job from an empty directory: it carries the configurations and launchers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.package import install_wheel

# The demo with a recipe of a few updates; the rest is the installed command.
SHORT_DEMO = """
import sys
from dataclasses import replace
from megadistill.cli.main import main
from megadistill.demo.recipes import RECIPES

recipe = RECIPES["demo"]
short = ("train.max_steps=1", "train.global_batch_size=4", "train.micro_batch_size=4")
models = {name: replace(model, sft=(*model.sft, *short)) for name, model in recipe.models.items()}
sizes = {"teacher": 400, "references": 16, "prompts": 48, "valid": 8, "test": 8}
RECIPES["demo"] = replace(recipe, sizes=sizes, models=models)
sys.exit(main(["demo", *sys.argv[1:]]))
"""
SETTINGS = [
    "train.max_steps=2",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "train.eval_every=0",
    "generation.max_new_tokens=4",
    "eval.max_new_tokens=4",
    "eval.seeds=[1]",
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_wheel(tmp_path_factory.mktemp("wheel"))


def run(site: Path, folder: Path, *arguments: str) -> str:
    """Output of Python with the wheel in place of this clone."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_wheel_is_what_runs(site: Path, tmp_path: Path) -> None:
    code = "import megadistill; print(megadistill.__file__, megadistill.__version__)"
    file, version = run(site, tmp_path, "-c", code).split()
    assert Path(file) == site / "megadistill" / "__init__.py"
    assert (site / f"megadistill-{version}.dist-info").is_dir()
    assert (site / "megadistill" / "py.typed").is_file()
    assert not list(site.glob("*configs*")) and not list(site.glob("*launchers*"))


def test_a_shipped_configuration_trains(site: Path, tmp_path: Path) -> None:
    run(site, tmp_path, "-m", "megadistill", "train", "--config", "configs/smoke.yaml", "train.max_steps=1")
    assert (tmp_path / "runs" / "smoke" / "summary.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


def test_the_demo_runs_in_the_working_directory(site: Path, tmp_path: Path) -> None:
    output = run(site, tmp_path, "-c", SHORT_DEMO, *SETTINGS)
    run_dir = tmp_path / "runs" / "demo"
    names = {path.name for path in run_dir.iterdir()}
    assert {"student", "curves.png", "evaluation.json", "summary.json"} <= names
    assert set(json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))["demo"]) == {
        "teacher",
        "sft",
        "distilled",
    }
    assert "student, distilled" in output
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    times = {name: (run_dir / name).stat().st_mtime_ns for name in ("evaluation.json", "student", "metrics.jsonl")}
    run(site, tmp_path, "-c", SHORT_DEMO, *SETTINGS)
    assert {name: (run_dir / name).stat().st_mtime_ns for name in times} == times, "finished stages are not repeated"
