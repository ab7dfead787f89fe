"""Revisions of hub names: the real huggingface_hub and transformers against a hub on the loopback address."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megadistill.checkpoint.hub_commits import COMMITS
from megadistill.checkpoint.model_card import model_card
from megadistill.cli.main import main
from megadistill.config.load import load_config
from megadistill.data.dataset import load_examples
from megadistill.data.tokenize import load_tokenizer
from megadistill.errors import ConfigError, DataError
from megadistill.models.loading import load_model, load_model_config, whole_model
from megadistill.models.weights import load_weights
from tests.support.fake_hub import FakeHub, hub_in_place
from tests.support.runs import ROOT, losses, run_layout, settings
from tests.support.spawn import run_ranks

NAME = "owner/model"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with hub_in_place(tmp_path / "cache") as found:
        yield found


def _folder(folder: Path, assets: Path, seed: int) -> Path:
    """A student with a tokenizer; each seed has other weights."""
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(assets / "llama" / "student" / "config.json")
    shutil.copytree(assets / "tokenizer", folder)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def _embedding(name: str) -> torch.Tensor:
    loaded = load_model(name, dtype="fp32", vocab_size=300, seed=0, attention="sdpa", where="x")
    return whole_model(loaded, torch.device("cpu")).get_input_embeddings().weight.data


def _load_revisions(_: int, folders: list[Path], old: str, assets: Path) -> None:
    """In a process of its own: what downloads has threads, and later tests fork."""
    first, second = (_embedding(str(folder)) for folder in folders)
    assert not torch.equal(first, second)
    for revision, expected in (("@v1", first), (f"@{old}", first), ("", second), ("@refs/pr/2", second)):
        assert torch.equal(_embedding(NAME + revision), expected), revision
    assert torch.equal(load_weights(f"{NAME}@v1", "x").get_input_embeddings().weight[: len(first)], first)
    assert load_tokenizer(f"{NAME}@v1").get_vocab() == load_tokenizer(assets / "tokenizer").get_vocab()
    prompts, texts = folders[0].parent / "prompts.txt", []
    prompts.write_text("The young driver\n", encoding="utf-8")
    shards = str(folders[0].parent / "shards")
    assert main(["shard", f"{NAME}@v1", shards, "--tp-size", "2"]) == 0
    for number, model in enumerate((str(folders[0]), f"{NAME}@v1", shards, NAME)):
        output = folders[0].parent / f"{number}.jsonl"
        more = ["--input", str(prompts), "--output", str(output), "--max-new-tokens", "8", "--template", "plain",
                "--max-prompt-tokens", "64"]  # fmt: skip
        assert main(["generate", "--model", model, *more]) == 0
        texts.append(output.read_text(encoding="utf-8"))
    assert texts[0] == texts[1] == texts[2] != texts[3]
    with pytest.raises(ConfigError, match=r"^x: cannot read a model configuration from 'owner/model@v9': .*v9"):
        load_model_config(f"{NAME}@v9", "x")


def test_each_revision_has_its_own_weights(hub: FakeHub, assets: Path, tmp_path: Path) -> None:
    folders = [_folder(tmp_path / str(seed), assets, seed) for seed in (1, 2)]
    old = hub.add_commit(NAME, folders[0], "v1")
    hub.add_commit(NAME, folders[1], "main", "refs/pr/2")
    run_ranks(_load_revisions, 1, folders, old, assets)


def test_a_run_goes_on_with_the_commits_that_it_began_with(
    hub: FakeHub, assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folders = [_folder(tmp_path / str(seed), assets, seed) for seed in (1, 2, 3)]
    old = hub.add_commit("owner/teacher", folders[0], "main")
    tag = hub.add_commit(NAME, folders[1], "v1")

    def run(name: str, steps: int) -> Path:
        more = settings(assets, "llama", f"train.max_steps={steps}", "train.save_every=1", "generation.mode=dataset")
        unset = ("model.tokenizer=null", "data.prompts_path=null", "data.prompts_ratio=0")
        names = ("model.teacher.path=owner/teacher", f"model.student.path={NAME}", "model.student.revision=v1")
        run_layout(1, [(str(tmp_path / name), [*more, *unset, *names])])
        return tmp_path / name

    whole, parts = run("whole", 2), run("parts", 1)
    assert json.loads((parts / COMMITS).read_text(encoding="utf-8")) == {"owner/teacher": old, f"{NAME}@v1": tag}
    new = hub.add_commit("owner/teacher", folders[2], "main")
    capfd.readouterr()
    run("parts", 2)
    said = f"owner/teacher is commit {new} now; this run goes on with {old}, which it began with"
    assert said in capfd.readouterr().out
    assert losses(parts) == losses(whole), "with the newer teacher, the second step has another loss"
    card = model_card(parts / "checkpoints" / "step_2", "owner/mine")
    assert f"owner/model@v1 (commit {tag}), distilled from owner/teacher (commit {old})" in card
    assert "base_model:\n- owner/model\n" in card


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.student.revision=v1", "model.student.revision=v1: {folder} is local, and only names of the hub have "),
        ("model.teacher.revision=v1", "model.teacher.revision=v1 needs model.teacher.path"),
        ("model.student.path={folder}@v1", "model.student.path: {folder}@v1: {folder} is local, and only names of the"),
        ("model.student.path=a/b@", "model.student.path: a/b@: a branch, tag or commit must follow the @"),
    ],
)
def test_a_revision_of_nothing_on_the_hub_is_one_line(
    override: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    common = [f"run.dir={tmp_path / 'run'}", f"model.student.path={folder}", "loss.dac_kl=0", "loss.span=0"]
    more = ["generation.mode=dataset", "data.train_path=rows.jsonl", override.format(folder=folder)]
    assert main(["train", "--config", str(ROOT / "configs" / "base.yaml"), *common, *more]) == 2
    assert line.format(folder=folder) in capsys.readouterr().err


def test_a_data_set_has_revisions_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def load(path: str, *, revision: str | None, **_: Any) -> list[dict[str, str]]:
        asked.append((path, revision))
        return [{"instruction": "Say yes.", "output": "Yes."}]

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("megadistill.data.readers.offline_if_unreachable", lambda: False)
    for name in ("owner/rows@refs/convert/parquet", "owner/rows"):
        assert len(load_examples(name).examples) == 1
    assert asked == [("owner/rows", "refs/convert/parquet"), ("owner/rows", None)]


def test_revision_and_path_are_one_setting(tmp_path: Path) -> None:
    def student(*more: str) -> tuple[str, str | None]:
        base = ["run.dir=x", "model.teacher.path=t/t", "model.student.path=owner/model", "data.train_path=rows.jsonl"]
        found = load_config(ROOT / "configs" / "base.yaml", [*base, *more]).model.student
        return found.path, found.revision

    assert student("model.student.revision=v1") == student("model.student.path=owner/model@v1") == (f"{NAME}@v1", None)
    with pytest.raises(ConfigError, match="model.student.path=owner/model@v1 has a revision already"):
        student("model.student.path=owner/model@v1", "model.student.revision=v2")
    with pytest.raises(DataError, match=f"{tmp_path} is local"):
        load_examples(f"{tmp_path}@v1")
