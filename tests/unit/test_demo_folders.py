"""The demo and the study write where the user is, and a study everything into its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megadistill.config.load import flatten, load_config
from megadistill.config.shipped import find_config
from megadistill.demo import run, stages, study
from megadistill.demo.assets import is_ready, make_assets, settings_for


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [stages.CONFIG, study.CONTROL])
def test_a_study_reads_its_own_assets_only(name: str, elsewhere: Path) -> None:
    settings = settings_for(name, 3, Path("mine/assets"))
    config = load_config(find_config(name), settings)
    paths = [text for text in flatten(config.model_dump()).values() if isinstance(text, str) and "assets" in text]
    assert paths and all(Path(path).is_relative_to("mine/assets/demo_3") for path in paths)
    assert config.run.prepare == "none" and config.run.seed == 3
    usual = load_config(find_config(name), ["run.seed=3"])
    assert (config.model.teacher.path is None) == (usual.model.teacher.path is None)


def test_assets_are_made_below_the_folder_that_is_given(elsewhere: Path) -> None:
    make_assets("smoke", 0, say=lambda _: None, root=Path("mine/assets"))
    assert is_ready(elsewhere / "mine" / "assets" / "smoke_0", "smoke")
    assert [path.name for path in elsewhere.iterdir()] == ["mine"]


def test_a_study_writes_into_its_folder(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    scores = {arm: dict.fromkeys(study._MEASURES, 1.0) for arm in study._ARMS}
    monkeypatch.setattr(study, "_one_seed", lambda seed, folder, keep: asked.append((seed, folder)) or scores)
    assert study.run(["--seeds", "7", "--folder", "mine"]) == 0
    assert asked == [(7, Path("mine/seed_7"))]
    assert json.loads((elsewhere / "mine" / "study.json").read_text(encoding="utf-8"))["seeds"] == [7]


def test_the_demo_stays_in_the_working_directory(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where: list[Path] = []
    monkeypatch.setattr(run, "run_demo", lambda overrides, again: where.append(Path.cwd()))
    monkeypatch.setattr(run, "show", lambda result, seconds: None)
    assert run.run(["run.dir=mine"]) == 0 and where == [elsewhere]
