"""Model folders coming in: what is refused, and what is tied."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megadistill.checkpoint.model_folder import model_folder
from megadistill.checkpoint.probe import probe_logits
from megadistill.checkpoint.reshard import shard_model
from megadistill.cli.main import main
from megadistill.config.load import load_config
from megadistill.config.schema import RunConfig
from megadistill.data.tokenize import load_tokenizer
from megadistill.errors import CheckpointError, ConfigError
from megadistill.models.folder_checks import quantization_of
from megadistill.models.loading import LoadedModel, load_model, load_model_config, whole_model
from megadistill.models.weights import load_weights
from tests.support.model_folders import EMBEDDING, HEAD, adapter_folder, configure, is_tied, llama_folder
from tests.support.tokenizers import byte_level

ROOT = Path(__file__).resolve().parents[2]


def _edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _refusal(path: Path | str) -> str:
    """The one line with which a model is refused, be it loaded by this project or by transformers."""
    lines = []
    for load in (partial(load_weights, where="model.x.path"), partial(_open, where="model.x.path")):
        with pytest.raises(ConfigError) as refused:
            load_model_config(str(path), "model.x.path")
            load(str(path))
        assert "\n" not in str(refused.value) and str(refused.value).startswith("model.x.path: ")
        lines.append(str(refused.value))
    assert lines[0] == lines[1] or all("cannot load the weights" in line for line in lines)
    return lines[1]


def _open(path: str, where: str = "x") -> LoadedModel:
    return load_model(path, dtype="fp32", vocab_size=504, seed=0, attention="sdpa", where=where)


# Tied by what the weights say.


@pytest.fixture
def lying(tmp_path: Path) -> Path:
    """Two matrices under a configuration that says there is one."""
    return configure(llama_folder(tmp_path / "lying"), tie_word_embeddings=True)


def test_a_head_of_its_own_is_kept_whatever_config_says(
    lying: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = probe_logits(AutoModelForCausalLM.from_pretrained(lying).eval(), 493)
    loaded = load_model(str(lying), dtype="fp32", vocab_size=493, seed=0, attention="sdpa", where="x")
    assert loaded.config.tie_word_embeddings is loaded.model.config.tie_word_embeddings is False
    assert "its own head is there and used" in capsys.readouterr().out
    shard_model(str(lying), tmp_path / "sharded", tp_size=2, dp_size=1)
    assert not is_tied(tmp_path / "sharded")
    # Also where an older version wrote the setting as it found it.
    configure(tmp_path / "sharded", tie_word_embeddings=True)
    loaded = load_model(str(tmp_path / "sharded"), dtype="fp32", vocab_size=493, seed=0, attention="sdpa", where="x")
    found = probe_logits(whole_model(loaded, torch.device("cpu")), 493)
    assert torch.allclose(found, plain, atol=1e-4)
    assert main(["verify", str(lying), str(tmp_path / "sharded"), "--rows", "2", "--greedy-tokens", "2"]) == 0


@pytest.mark.parametrize("case", ["equal", "head only", "embedding only"])
def test_one_matrix_is_tied_as_transformers_ties_it(tmp_path: Path, case: str) -> None:
    folder = llama_folder(tmp_path / "m", tie_word_embeddings=True)

    def change(weights: dict[str, torch.Tensor]) -> None:
        if case != "embedding only":
            weights[HEAD] = weights[EMBEDDING].clone()
        if case == "head only":
            del weights[EMBEDDING]

    _edit(folder, change)
    assert load_weights(str(folder), "x").config.tie_word_embeddings is True
    assert _open(str(folder)).config.tie_word_embeddings is True
    shard_model(str(folder), tmp_path / "sharded", tp_size=1, dp_size=1)
    assert is_tied(tmp_path / "sharded")


def test_merge_of_a_base_whose_config_is_wrong(lying: Path, tmp_path: Path) -> None:
    adapter = adapter_folder(lying, tmp_path / "adapter")
    assert main(["merge", str(lying), str(adapter), str(tmp_path / "merged")]) == 0
    assert not is_tied(tmp_path / "merged")


# Quantized models.


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"load_in_4bit": True}, "bitsandbytes"),
    ],
)
def test_quantized_models_are_refused_with_their_method(tmp_path: Path, settings: dict[str, Any], method: str) -> None:
    folder = configure(llama_folder(tmp_path / "m"), quantization_config=settings)
    for path in (folder, folder / "config.json"):
        line = _refusal(path)
        assert f"is quantized ({method})" in line and "use the unquantized model" in line


def test_quantization_that_is_named_elsewhere(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "m")
    assert quantization_of({"quantization_config": None}) is None
    (folder / "quantize_config.json").write_text("{}", encoding="utf-8")
    assert "is quantized (gptq)" in _refusal(folder)
    (folder / "quantize_config.json").unlink()
    configure(folder, compression_config={"quant_method": "sparseml"})
    assert "is quantized (sparseml)" in _refusal(folder)


def test_every_verb_refuses_a_quantized_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = llama_folder(tmp_path / "m")
    adapter, good = adapter_folder(folder, tmp_path / "adapter"), shutil.copytree(folder, tmp_path / "good")
    configure(folder, quantization_config={"quant_method": "fp8"})
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "Name a river.", "output": "Seine."}\n', encoding="utf-8")
    base = ["--config", str(ROOT / "configs" / "base.yaml"), f"run.dir={tmp_path / 'run'}", f"data.train_path={rows}"]
    base += ["data.max_prompt_tokens=32", "data.max_tokens=64", f"eval.path={rows}"]
    model = str(folder)
    for words in (
        ["generate", "--model", model, "--input", str(rows), "--max-prompt-tokens", "32", "--max-new-tokens", "4"],
        ["verify", model, str(good)],
        ["verify", str(good), model],
        ["shard", model, str(tmp_path / "out"), "--tp-size", "1"],
        ["merge", model, str(adapter), str(tmp_path / "out")],
        ["evaluate", *base, "--model", model, f"model.student.path={good}", f"model.teacher.path={good}"],
        ["train", *base, f"model.student.path={model}", f"model.teacher.path={good}"],
        ["train", *base, f"model.student.path={good}", f"model.teacher.path={model}"],
    ):
        assert main(words) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megadistill: ")]
        assert len(lines) == 1 and "is quantized (fp8)" in lines[0], words
    assert not (tmp_path / "out").exists()
    assert main(["inspect", model]) == 0
    assert "quantized   fp8" in capsys.readouterr().out


# Folders that are no models.


def test_a_folder_without_weights_is_refused_and_a_file_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = llama_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    line = _refusal(folder)
    assert "no weights" in line and "interrupted" in line and line.endswith(str(folder / "config.json"))
    (folder / "model.safetensors.index.json").write_text("{}", encoding="utf-8")  # it came before the files it names
    assert "no weights" in _refusal(folder)
    load_model(str(folder / "config.json"), dtype="fp32", vocab_size=504, seed=0, attention="sdpa", where="x")
    assert "is a configuration file: its weights are random" in capsys.readouterr().out


def test_git_lfs_pointers_are_named(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "m")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (folder / "model.safetensors").write_text(pointer, encoding="utf-8")
    assert "model.safetensors is a Git LFS pointer" in _refusal(folder) and "git lfs pull" in _refusal(folder)


def test_code_that_comes_with_a_model_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does anybody ask whether to run it, which transformers does where nothing is said."""
    folder = tmp_path / "model"
    folder.mkdir()
    code = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
    (folder / "own.py").write_text(code, encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"")
    tree: dict[str, Any] = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(tree), encoding="utf-8")
    tree = {"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}, "tokenizer_class": "OwnTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tree), encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    for load in (lambda: load_model_config(str(folder), "MODEL"), lambda: load_tokenizer(folder)):
        with pytest.raises(ConfigError, match=r"^[^\n]*code of its own, which is never run here \(trust_remote_code"):
            load()
    assert not (folder / "ran").exists()


def test_truncated_weights_are_one_line(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "m")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "cannot load the weights" in _refusal(folder)


def test_adapters_name_the_command_that_merges_them(tmp_path: Path) -> None:
    base = llama_folder(tmp_path / "base")
    adapter = adapter_folder(base, tmp_path / "adapter")
    assert f"megadistill merge {base} {adapter} FOLDER" in _refusal(adapter)
    shutil.copy(base / "config.json", adapter)  # as some trainers save it
    assert "megadistill merge" in _refusal(adapter)
    (adapter / "adapter_config.json").write_text("[", encoding="utf-8")
    assert f"megadistill merge BASE {adapter} FOLDER" in _refusal(adapter)


# Weights without a place.


def test_more_layers_than_the_configuration_has(tmp_path: Path) -> None:
    folder = configure(llama_folder(tmp_path / "m"), num_hidden_layers=1)
    line = _refusal(folder)
    assert "has weights of layer 1" in line and "has 1 layers" in line


def test_weights_that_a_layer_has_no_place_for(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "m")
    name = "model.layers.0.self_attn.q_proj.bias"
    _edit(folder, lambda weights: weights.update({name: torch.ones(32)}))
    assert "1 weights that have no place" in _refusal(folder) and name in _refusal(folder)


def test_harmless_weights_are_not_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = llama_folder(tmp_path / "m")
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    _edit(folder, lambda weights: weights.update(buffer))
    load_weights(str(folder), "x")
    _open(str(folder))
    assert capsys.readouterr().out == ""
    _edit(folder, lambda weights: weights.update({"v_head.summary.weight": torch.ones(1, 32)}))
    for load in (partial(load_weights, where="x"), _open):
        load(str(folder))
        assert "1 weights that its model does not use, v_head.summary.weight among them" in capsys.readouterr().out


# Runs are models.


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with two checkpoints, of which model and names alone are there."""
    for step in (1, 2):
        llama_folder(tmp_path / "run" / "checkpoints" / f"step_{step}" / "hf", seed=step)
        (tmp_path / "run" / "checkpoints" / f"step_{step}" / "manifest.json").write_text("{}", encoding="utf-8")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_2\n", encoding="utf-8")
    return tmp_path / "run"


def _config(run: Path, **paths: Path) -> RunConfig:
    more = [f"model.{name.replace('_', '.')}={path}" for name, path in paths.items()]
    return load_config(ROOT / "configs" / "base.yaml", [f"run.dir={run}", "data.max_tokens=64",
                                                        "data.max_prompt_tokens=32", *more])  # fmt: skip


def test_runs_are_models_for_training(run_dir: Path, tmp_path: Path) -> None:
    from megadistill.training.setup import check_models, model_paths, run_tokenizer

    first, last = (run_dir / "checkpoints" / f"step_{step}" for step in (1, 2))
    config = _config(tmp_path / "new", teacher_path=run_dir, student_path=first)
    folders = {"model.teacher.path": str(last / "hf"), "model.student.path": str(first / "hf")}
    assert model_paths(config) == folders
    assert check_models(config, 1) == 1
    assert config.model.teacher.path == str(run_dir), "resolved.yaml keeps what the user typed"
    run_tokenizer(config)  # the student's
    for folder in (first, last):
        (folder / "hf" / "tokenizer.json").unlink()
        (folder / "hf" / "tokenizer_config.json").unlink()
    byte_level(last / "hf")
    run_tokenizer(_config(tmp_path / "new", teacher_path=first, student_path=first, tokenizer=run_dir))


def test_runs_are_tokenizers_of_verbs(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "Name a river.", "output": "Seine."}\n', encoding="utf-8")
    model = llama_folder(tmp_path / "m")
    for file in model.glob("tokenizer*"):
        file.unlink()
    limits = ["--max-prompt-tokens", "32", "--template", "plain"]
    assert main(["prepare", str(rows), str(tmp_path / "data"), "--tokenizer", str(run_dir), *limits]) == 0
    assert main(["shard", str(model), str(tmp_path / "sharded"), "--tp-size", "1", "--tokenizer", str(run_dir)]) == 0
    generate = ["generate", "--model", str(model), "--tokenizer", str(run_dir)]
    assert main([*generate, "--input", str(rows), *limits, "--max-new-tokens", "2"]) == 0
    verify = ["verify", str(model), str(model), "--tokenizer", str(run_dir)]
    assert main([*verify, "--rows", "1", "--greedy-tokens", "0"]) == 0
    capsys.readouterr()


def test_a_run_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step_1.partial").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="has no complete checkpoint"):
        model_folder(str(tmp_path / "run"))
