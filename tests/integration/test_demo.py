"""The demo's stages follow the run: what an earlier run left is replaced when the weights differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megadistill.config.load import load_config
from megadistill.demo.stages import evaluate_once, export_once
from tests.support.runs import ROOT, run_layout, settings, weights


def is_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def run(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, and the same continued to step 4 in ``longer``."""
    folder = tmp_path_factory.mktemp("demo")
    overrides = settings(assets, "llama", "checkpoint.keep_last=1")
    run_layout(1, [(str(folder / "run"), [*overrides, "train.max_steps=2"])])
    shutil.copytree(folder / "run", folder / "longer")
    run_layout(1, [(str(folder / "longer"), [*overrides, "train.max_steps=4"])])
    return folder


def continue_run(run: Path, tmp_path: Path) -> None:
    """Puts the continued run in the place of the short one, beside what the demo has written there."""
    for name in ("checkpoints", "metrics.jsonl", "summary.json"):
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        (shutil.copytree if (run / "longer" / name).is_dir() else shutil.copy)(run / "longer" / name, path)


def test_the_export_follows_the_run(run: Path, tmp_path: Path) -> None:
    run_dir, folder = tmp_path / "run", tmp_path / "run" / "student"
    shutil.copytree(run / "run", run_dir)
    export_once(run_dir, folder)
    assert is_equal(load_file(folder / "model.safetensors"), weights(run / "run", 2))
    continue_run(run, tmp_path)
    export_once(run_dir, folder)
    assert is_equal(load_file(folder / "model.safetensors"), weights(run / "longer", 4))
    assert not is_equal(weights(run / "run", 2), weights(run / "longer", 4))
    assert json.loads((folder / "source.json").read_text(encoding="utf-8"))["step"] == 4


def test_an_export_of_the_same_checkpoint_stays(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    export_once(run / "run", folder)
    before = folder.stat().st_mtime_ns, (folder / "model.safetensors").stat().st_ino
    export_once(run / "run", folder)
    assert (folder.stat().st_mtime_ns, (folder / "model.safetensors").stat().st_ino) == before


def test_an_export_without_a_record_is_replaced(run: Path, tmp_path: Path) -> None:
    """One of an earlier version, or one that was interrupted."""
    folder = tmp_path / "student"
    export_once(run / "longer", folder)
    (folder / "source.json").unlink()
    export_once(run / "run", folder)
    assert is_equal(load_file(folder / "model.safetensors"), weights(run / "run", 2))


def test_the_evaluation_follows_weights_and_settings(run: Path, assets: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "run", tmp_path / "run")
    more = [f"eval.path={assets / 'data' / 'test.jsonl'}", "eval.max_new_tokens=2", "eval.seeds=[1]", "eval.max_rows=4"]
    base = ROOT / "configs" / "base.yaml"
    config = load_config(base, settings(assets, "llama", f"run.dir={tmp_path}", *more))
    models, output = {"student": str(tmp_path / "run")}, tmp_path / "evaluation.json"
    first = evaluate_once(config, models, output)
    written = output.stat().st_mtime_ns
    assert evaluate_once(config, models, output) == first and output.stat().st_mtime_ns == written
    continue_run(run, tmp_path)
    second = evaluate_once(config, models, output)
    assert second["results"]["student"]["test"]["nll"] != first["results"]["student"]["test"]["nll"]
    fewer = load_config(base, settings(assets, "llama", f"run.dir={tmp_path}", *more[:-1], "eval.max_rows=2"))
    assert len(evaluate_once(fewer, models, output)["results"]["student"]["test"]["predictions"]) == 2
