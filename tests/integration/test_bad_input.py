"""What a user can cause ends with exit code 2 and one clear line, never a traceback and never a hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megadistill.cli.main import VERBS, main
from tests.support.runs import free_port, settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def refused(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs ``train`` with changed settings and returns its only line of error."""

    def run(*more: str) -> str:
        overrides = settings(assets, "llama", f"run.dir={tmp_path / 'run'}", "train.max_steps=1", *more)
        assert main(["train", "--config", str(ROOT / "configs" / "base.yaml"), *overrides]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megadistill: ")]
        assert len(lines) == 1
        assert not (tmp_path / "run").exists()
        return lines[0]

    return run


def test_keys_types_and_values(refused: Callable[..., str]) -> None:
    line = refused("loss.dac_k=1")
    assert "loss.dac_k" in line and "dac_kl" in line and "command line" in line
    assert "train.max_steps" in refused("train.max_steps=many")
    assert "minimize" in refused("loss.gate_objective=minimse")
    assert "on_policy" in refused("generation.mode=replay")
    assert "train.micro_batch_size" in refused("train.micro_batch_size=3")
    assert "no such" in refused("model.student.path=./nowhere")
    assert "128 positions" in refused("data.max_tokens=4096")


def test_topology(refused: Callable[..., str]) -> None:
    line = refused("parallel.tp_size=2")
    assert "size of 2" in line and line.endswith("(see parallel.tp_size)")


def test_missing_files_name_the_nearest(refused: Callable[..., str], assets: Path) -> None:
    line = refused(f"data.train_path={assets / 'data' / 'trian.jsonl'}")
    assert "trian.jsonl" in line and "train.jsonl" in line
    line = refused(f"model.teacher.path={assets / 'llama' / 'techer'}")
    assert "model.teacher.path" in line and "teacher" in line
    assert "model.tokenizer" in refused("model.tokenizer=null")
    assert "no such checkpoint" in refused("train.resume=/no/such/checkpoint")
    assert "config.json" in refused(f"model.student.path={assets}")


def test_bad_rows_name_file_and_line(refused: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    good = json.dumps({"instruction": "Say hello.", "input": "", "output": "Hello."})
    for bad in ("{", '{"instruction": ""}', "[1]", '{"output": "x"}'):
        file.write_text(f"{good}\n{bad}\n{good}\n", encoding="utf-8")
        line = refused(f"data.train_path={file}")
        assert f"{file}:2" in line
    file.write_text("", encoding="utf-8")
    assert str(file) in refused(f"data.train_path={file}")


def test_long_prompts(refused: Callable[..., str]) -> None:
    line = refused("data.max_prompt_tokens=20", "data.long_prompt=error")
    assert "20" in line and "data.max_prompt_tokens" in line
    assert "no row is left" in refused("data.max_prompt_tokens=2", "data.long_prompt=drop")


def test_tokenizers_that_differ(refused: Callable[..., str], assets: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from megadistill.demo.tokenizer import train_tokenizer

    other = tmp_path / "other"
    train_tokenizer(["quite another text, with other words in it " * 30], other, vocab_size=300)
    configuration = AutoConfig.from_pretrained(assets / "llama" / "student" / "config.json")
    AutoModelForCausalLM.from_config(configuration).save_pretrained(other)
    line = refused(f"model.student.path={other}")
    assert "vocabular" in line and "token" in line


def test_too_few_vocabulary_rows(refused: Callable[..., str], assets: Path, tmp_path: Path) -> None:
    config = json.loads((assets / "llama" / "student" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "small.json").write_text(json.dumps({**config, "vocab_size": 100}), encoding="utf-8")
    assert "padded rows" in refused(f"model.student.path={tmp_path / 'small.json'}")


def test_unknown_model_types(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "bert.json").write_text(json.dumps({"model_type": "bert"}), encoding="utf-8")
    line = refused(f"model.student.path={tmp_path / 'bert.json'}")
    assert "bert" in line and "llama" in line


def test_folder_of_another_run(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megadistill.config.load import dump_resolved, load_config

    base, run_dir = str(ROOT / "configs" / "base.yaml"), tmp_path / "run"
    overrides = settings(assets, "llama", f"run.dir={run_dir}", "train.max_steps=1")
    run_dir.mkdir()
    dump_resolved(load_config(base, overrides), run_dir / "resolved.yaml")
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n', encoding="utf-8")
    before = sorted(run_dir.iterdir())
    for more, words in (
        (["loss.span=0.5"], "loss.span=1.0 there, 0.5 here"),
        (["train.resume=never"], "train.resume=never"),
    ):
        assert main(["train", "--config", base, *overrides, *more]) == 2
        assert words in capsys.readouterr().err
    assert sorted(run_dir.iterdir()) == before
    (run_dir / "resolved.yaml").unlink()
    assert main(["train", "--config", base, *overrides]) == 2
    assert "holds another run" in capsys.readouterr().err


def test_folders_that_cannot_be_used(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    base = str(ROOT / "configs" / "base.yaml")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        overrides = settings(assets, "llama", f"run.dir={run_dir}", "train.max_steps=1")
        assert main(["train", "--config", base, *overrides]) == 2
        assert str(tmp_path / "file") in capsys.readouterr().err
    arguments = ["--model", str(assets / "llama" / "student" / "config.json"), "--tokenizer", str(assets / "tokenizer")]
    rows = ["--input", str(assets / "data" / "test.jsonl"), "--template", "plain"]
    for more, words in (
        (["--output", str(tmp_path)], "is a folder"),
        (["--batch-size", "0"], "--batch-size"),
        (["--tp-size", "-1"], "--tp-size"),
        (["--max-new-tokens", "500"], "reads at most 128 positions"),
    ):
        assert main(["generate", *arguments, *rows, *more]) == 2
        assert words in capsys.readouterr().err
    two = ["--model", str(assets / "llama" / "student"), "--model", str(assets / "opt" / "student")]
    overrides = settings(assets, "llama", f"run.dir={tmp_path / 'run'}", "eval.path=x.jsonl")
    assert main(["evaluate", "--config", base, *two, *overrides]) == 2
    assert "two arguments have the name 'student'" in capsys.readouterr().err


def test_a_model_that_lacks_weights(refused: Callable[..., str], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=500, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "half")
    file = tmp_path / "half" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "gate_proj" in name)
    save_file({n: t for n, t in tensors.items() if n != name}, file, metadata={"format": "pt"})
    from megadistill.errors import ConfigError
    from megadistill.models.loading import load_model

    with pytest.raises(ConfigError, match="lacks 1 weights of its model, .*gate_proj"):
        load_model(str(tmp_path / "half"), dtype="fp32", vocab_size=400, seed=0, attention="sdpa", where="model.x.path")


def test_shares_that_leave_no_row(refused: Callable[..., str]) -> None:
    line = refused("data.prompts_ratio=0.95", "train.global_batch_size=4")
    assert "leaves no training row" in line and "(see data.prompts_ratio and train.global_batch_size)" in line
    assert "data.prompts_path" in refused("data.prompts_ratio=0")
    assert "data.train_path is missing" in refused("data.train_path=null")


def test_verbs_and_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err
    assert main(["train"]) == 2
    assert "--config" in capsys.readouterr().err
    assert main(["train", "--config", str(tmp_path / "no.yaml")]) == 2
    assert "no.yaml" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nothing"), str(tmp_path / "out")]) == 2
    assert "no such checkpoint" in capsys.readouterr().err
    for verb in VERBS:
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0 and f"megadistill {verb}" in capsys.readouterr().out


def test_empty_evaluation_set(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("", encoding="utf-8")
    overrides = settings(assets, "llama", f"run.dir={tmp_path / 'run'}", f"eval.path={empty}")
    model = str(assets / "llama" / "student" / "config.json")
    assert main(["evaluate", "--config", str(ROOT / "configs" / "base.yaml"), "--model", model, *overrides]) == 2
    assert str(empty) in capsys.readouterr().err


def test_the_launcher_passes_the_exit_code_on(assets: Path, tmp_path: Path) -> None:
    """Two real processes whose layout does not fit: both end, the launcher returns 2, one line has the reason."""
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", free_port()]
    overrides = settings(assets, "llama", f"run.dir={tmp_path / 'run'}", "parallel.tp_size=3")
    done = subprocess.run(
        [*command, "launchers/run.sh", "--config", "configs/base.yaml", *overrides],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("megadistill: ")]
    assert len(lines) == 1 and "size of 3 does not divide" in lines[0]
    assert "Traceback" not in done.stdout + done.stderr
