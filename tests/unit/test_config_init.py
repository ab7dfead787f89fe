"""``megadistill config init``: a file that loads, says what was chosen and why, and fits; never over another file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megadistill.cli.main import main
from megadistill.config.load import load_config
from tests.support.model_folders import llama_folder

BIG = ["--teacher", "meta-llama/Llama-2-13b-hf", "--student", "meta-llama/Llama-2-7b-hf"]


def _init(*more: str) -> int:
    return main(["config", "init", *more])


def test_a_file_for_two_hub_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan of the file is the one that was promised, and it fits."""
    monkeypatch.chdir(tmp_path)
    machine = ["--gpus-per-node", "6", "--gpu", "H200-141"]
    data = ["--data", "rows: 1 #x.jsonl", "--valid", "it's.jsonl"]
    assert _init(*BIG, *data, *machine, "-o", "new/mine.yaml") == 0
    line, *_ = capsys.readouterr().out.splitlines()
    text = Path("new/mine.yaml").read_text(encoding="utf-8")
    config = load_config("new/mine.yaml")
    assert (config.data.train_path, config.data.valid_path) == (data[1], data[3])
    assert config.train.global_batch_size == 66 and config.train.eval_every == 500 and config.run.dir == "runs/mine"
    assert config.model.teacher.path == BIG[1] and config.model.student.dtype == "bf16"
    assert config.loss.upper == 0.98 and config.train.max_steps is None and config.train.epochs == 3
    grid = f"tp {config.parallel.tp_size} x dp {6 // int(config.parallel.tp_size)}, ZeRO-{config.parallel.zero_stage}"
    assert f"{grid}: the fastest of" in line and line.split(": ", 1)[1] in text
    assert "must divide 32, 40 heads" in text and "s a step" in text.split("zero_stage: ")[1].splitlines()[0]
    assert main(["plan", "--config", "new/mine.yaml", *machine]) == 0
    assert grid in capsys.readouterr().out
    assert main(["plan", "--config", "new/mine.yaml", *machine, "--sweep"]) == 0
    assert set(yaml.safe_load(text)) >= {"run", "model", "parallel", "data", "train", "optim"}


def test_a_file_for_folders_on_cpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Positions of the models limit lengths; without data there is a comment."""
    folder = llama_folder(tmp_path / "model", max_position_embeddings=100)
    file = tmp_path / "tiny.yaml"
    models = ["--teacher", str(folder), "--student", str(folder)]
    assert _init(*models, "--cpu", "--gpus-per-node", "2", "-o", str(file)) == 0
    text, config = file.read_text(encoding="utf-8"), load_config(file)
    assert (config.data.max_tokens, config.data.max_prompt_tokens, config.generation.max_new_tokens) == (100, 50, 50)
    assert config.model.student.dtype == "fp32" and config.train.eval_every == 0
    assert "train_path: null  # the file that megadistill prepare writes" in text
    assert "as long as both models can read" in text and "CPU core" in text
    before = file.read_bytes()
    for arguments, words in (
        ([*models, "-o", str(file)], "exists already; choose another name"),
        ([*models, "-o", str(tmp_path / "x.json")], "the name must end in .yaml"),
        ([*models, "-o", str(tmp_path / "x.yaml"), "--gpu", "H100-80", "--cpu"], "plans without GPUs"),
        ([*models, "-o", str(tmp_path / "x.yaml"), "--data", "${oc.env:HOME}"], "${oc.env:"),
        ([*models[:3], "./none", "-o", str(tmp_path / "x.yaml")], "model.student.path"),
        ([*BIG, "-o", str(tmp_path / "x.yaml"), "--gpus-per-node", "1", "--gpu-memory", "80GB"], "this would: --nodes"),
        (
            [*BIG, "-o", str(tmp_path / "x.yaml"), "--gpus-per-node", "1", "--gpu-memory", "1GB"],
            "nor up to eight times",
        ),
        (models, "the following arguments are required: -o/--output"),
    ):
        assert _init(*arguments) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megadistill: ")]
        assert words in line
    assert file.read_bytes() == before and not (tmp_path / "x.yaml").exists()
    assert main(["config"]) == main(["config", "int"]) == 2
    assert "allowed: init; did you mean init?" in capsys.readouterr().err
