"""Where exports go: to a hub (the real huggingface_hub, against one on the loopback address), and into lm-eval."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megadistill.checkpoint import push
from megadistill.cli.main import main
from megadistill.data.tokenize import load_tokenizer
from megadistill.decoding.kv_cache import PrefillChunk
from megadistill.engines.inference import open_model
from megadistill.losses import Head, label_nats
from megadistill.models.loading import load_model_config
from megadistill.parallel.context import ParallelContext
from tests.support.fake_hub import TOKEN, FakeHub, hub_in_place
from tests.support.runs import run_layout, settings


@pytest.fixture(scope="module")
def run(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, with scores."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    more = ("train.max_steps=1", "generation.mode=dataset", "data.prompts_path=null", "data.prompts_ratio=0")
    run_layout(1, [(str(run), settings(assets, "llama", *more))])
    entry = {"sampled": {"rouge_l": {"mean": 12.345, "std": 1.0}}, "greedy": {"rouge_l": 20.0, "exact_match": 5.0}}
    results = {"student": {"valid": {**entry, "nll": 1.5}, "vicuna": {"sampled": None, "greedy": None, "nll": None}}}
    record = {"format": "megadistill evaluation 2", "results": results, "history": []}
    (run / "evaluation.json").write_text(json.dumps(record), encoding="utf-8")
    return run


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with hub_in_place(tmp_path / "cache") as found:
        yield found


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megadistill: ")]
    return line


def test_every_file_arrives_with_a_card(
    run: Path, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "student"
    assert main(["export", str(run), str(folder), "--push", "owner/name", "--private"]) == 0
    assert f"pushed to {hub.endpoint}/owner/name" in capsys.readouterr().out
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.files == {("owner/name", "main"): files} and hub.repos == {"owner/name": True}
    assert {"README.md", "config.json", "tokenizer.json", "model.safetensors"} <= set(files)
    assert main(["export", str(folder), "--push", "owner/name", "--revision", "v2"]) == 0
    assert hub.branches == {"owner/name": ["v2"]} and hub.files["owner/name", "v2"] == files

    card = files["README.md"].decode()
    _, metadata, text = card.split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["distillation", "megadistill"],
    }  # fmt: skip
    assert "# name\n" in text and ", 1 updates)" in text and 'from_pretrained("owner/name")' in text
    assert "| `generation.mode` | dataset |" in text and "| `optim.lr` |" in text
    assert "| student | valid | 12.35 | 20 | 5 | 1.5 |\n| student | vicuna | - | - | - | - |" in text
    assert str(run.parent) not in card and str(Path.home()) not in card  # no path of this machine


def test_the_card_names_models_of_the_hub(run: Path, tmp_path: Path) -> None:
    from megadistill.checkpoint.model_card import model_card

    copy = tmp_path / "run"
    (copy / "checkpoints").mkdir(parents=True)
    (copy / "checkpoints" / "step_1").symlink_to(run / "checkpoints" / "step_1")
    tree = yaml.safe_load((run / "resolved.yaml").read_text(encoding="utf-8"))
    tree["model"]["student"]["path"], tree["model"]["teacher"]["path"] = "Qwen/Small", "Qwen/Large"
    step = copy / "step_1"
    step.mkdir()
    (step / "manifest.json").write_bytes((run / "checkpoints" / "step_1" / "manifest.json").read_bytes())
    (step / "resolved.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    card = model_card(step, "owner/name")
    assert "base_model:\n- Qwen/Small\n" in card and "Qwen/Small, distilled from Qwen/Large (megadistill" in card
    assert "## Scores" not in card


def test_what_a_hub_refuses_is_one_line(
    run: Path, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What can be known before the export is said before it; a push that failed can be repeated without it."""
    folder = tmp_path / "student"
    export = ["export", str(run), str(folder), "--push"]
    monkeypatch.setattr(push, "ANSWER_S", 0.5)
    for name, token, waits_at, words in (
        ("owner", TOKEN, "nothing", "--push owner: a repository is OWNER/NAME"),
        ("a/b/c", TOKEN, "nothing", "a repository is OWNER/NAME"),
        ("owner/name", "", "nothing", "there is no token; set HF_TOKEN, or log in with: hf auth login"),
        ("owner/name", "hf_wrong", "nothing", "the token was not accepted: "),
        ("owner/name", TOKEN, "whoami", "timed out"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        hub.waits_at = waits_at
        assert main([*export, name]) == 2
        line = _error(capsys)
        assert words in line and (len(token) < 5 or token not in line)
        assert not folder.exists()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.waits_at, hub.fails_at = "nothing", "/api/repos/create"
    assert main([*export, "other/name"]) == 2
    line = _error(capsys)
    assert "403" in line and "is pushed again with: megadistill export " in line
    hub.fails_at = "nothing"
    again = line.partition("again with: megadistill ")[2].split()
    assert main(again) == 0
    assert hub.files["other/name", "main"].keys() == {path.name for path in folder.iterdir()}
    hub.waits_at = "/commit/"
    assert main(again) == 2
    assert "timed out" in _error(capsys)


def test_options_that_do_not_fit(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        ([str(run)], "FOLDER is missing"),
        ([str(run), str(tmp_path / "x"), "--private"], "--private is about --push"),
        ([str(run), str(tmp_path / "x"), "--revision", "v"], "--revision is about --push"),
        ([str(run), "--push", "a/b"], "is no exported folder; give FOLDER"),
        ([str(run / "checkpoints" / "step_1" / "hf"), "--push", "a/b", "--dtype", "bf16"], "FOLDER, where to write it"),
    ):
        assert main(["export", *arguments]) == 2
        assert words in _error(capsys)
    assert not (tmp_path / "x").exists()


LM_EVAL = os.environ.get("MEGADISTILL_LM_EVAL") or shutil.which("lm-eval")


@pytest.mark.skipif(LM_EVAL is None, reason="no lm-eval (in PATH, or MEGADISTILL_LM_EVAL): it is installed apart")
def test_lm_evaluation_harness_finds_our_likelihoods(run: Path, tmp_path: Path) -> None:
    """The command of docs/evaluation.md, with a task of two rows: log-likelihoods as our decoder computes them."""
    assert LM_EVAL is not None
    export, rows = tmp_path / "student", tmp_path / "rows.jsonl"
    assert main(["export", str(run), str(export)]) == 0
    choices = ["The Loire.", "A dog."]
    asked = [{"question": text, "choices": choices, "answer": i} for i, text in enumerate(("A river?", "An animal?"))]
    rows.write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    task = {
        "task": "two_rows", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}\n",
        "doc_to_choice": "{{choices}}", "doc_to_target": "answer", "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "two_rows.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    command = [
        LM_EVAL, "run", "--model", "hf", "--model_args", f"pretrained={export},dtype=float32", "--tasks", "two_rows",
        "--include_path", str(tmp_path), "--device", "cpu", "--output_path", str(tmp_path / "out"), "--log_samples",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_TOKEN")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").glob("*/samples_two_rows_*.jsonl")
    found = [
        [float(part[0][0]) for part in json.loads(line)["resps"]]
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    # The harness counts white space at the end of a prompt to the text, and padded rows as classes.
    tokenizer, size = load_tokenizer(str(export)), int(load_model_config(str(export), "export").vocab_size)
    with open_model(str(export), ParallelContext.single(), vocab_size=size) as model:
        expected = [
            [_log_likelihood(model, tokenizer, str(row["question"]), f"\n{text}") for text in choices] for row in asked
        ]
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=1e-3)


def _log_likelihood(model: Any, tokenizer: Any, prompt: str, text: str) -> float:
    """Of the tokens of a text after a prompt."""
    whole, before = (tokenizer(part, verbose=False)["input_ids"] for part in (prompt + text, prompt))
    (hidden,) = model.read([PrefillChunk(0, 0, tuple(whole[:-1]))])
    labels = torch.tensor(whole[len(before) :])
    return -float(label_nats(Head.of(hidden[len(before) - 1 :], model.head), labels, model.shard).sum())
