"""One rule for the names of models, tokenizers and data sets."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadistill.data.dataset import load_examples
from megadistill.data.hub import check_name, is_hub_name, offline_if_needed
from megadistill.data.tokenize import load_tokenizer
from megadistill.errors import ConfigError, DataError, MegadistillError
from megadistill.models.loading import load_model_config


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen2.5-0.5B", "owner/name.v2", "a-b_c/d", "databricks/dolly"])
def test_names_of_the_hub(name: str) -> None:
    assert is_hub_name(name)
    check_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "./gpt2",
        "../models/x",
        "/models/x",
        "~/x",
        "a/b/c",
        "models/",
        "x.jsonl",
        "a/b.json",
        "a/../b",
        "x.CSV",
        ".",
        "",
    ],
)
def test_names_that_are_paths(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name not in (".", ""):
        with pytest.raises(ConfigError, match="^model.x: no such file or folder: ") as error:
            check_name(name, "model.x", setting="model.x")
        assert error.value.setting == "model.x"
    assert not is_hub_name(name)


def test_what_exists_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert not is_hub_name("gpt2")
    check_name("gpt2")


def test_a_models_name_without_an_owner_is_one_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="cannot read a model configuration from 'no-such-model-here'"):
        load_model_config("no-such-model-here", "model.student.path")


def test_a_mistyped_path_gets_a_hint(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    with pytest.raises(DataError, match=rf"^no such file or folder: .*; did you mean {tmp_path / 'teacher'}\?$"):
        check_name(str(tmp_path / "techer"), error=DataError)
    with pytest.raises(ConfigError, match=f", and no folder {tmp_path / 'none'}$"):
        check_name(str(tmp_path / "none" / "x"))


@pytest.mark.parametrize("name", ["./nowhere", "nowhere.json", "a/b/c"])
def test_readers_follow_the_rule(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for read in (load_examples, load_tokenizer, lambda path: load_model_config(path, "model.student.path")):
        with pytest.raises(MegadistillError, match="no such file or folder: "):
            read(name)


def test_the_network_is_asked_for_names_of_the_hub_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("megadistill.data.hub.offline_if_unreachable", lambda: asked.append(1))
    offline_if_needed([None, str(tmp_path)])
    assert not asked
    offline_if_needed([str(tmp_path), "gpt2"])
    assert asked == [1]
