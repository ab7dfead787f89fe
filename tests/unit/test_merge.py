"""``megadistill merge``: with plain transformers, its folder gives the outputs of the unmerged PeftModel."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from megadistill.checkpoint import hf_files
from megadistill.cli.main import main
from tests.support.tokenizers import byte_level

ROOT = Path(__file__).resolve().parents[2]
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_key_value_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **LLAMA, "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", **LLAMA, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_positions": 64, "bos_token_id": 0},
}
COMMON = {"vocab_size": 504, "num_attention_heads": 4, "max_position_embeddings": 64, "eos_token_id": 0}
IDS = torch.arange(3, 43).view(2, 20)


def _base(folder: Path, family: str, *, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    tree = {**COMMON, **CONFIGS[family], "initializer_range": 0.2, **more}
    config = AutoConfig.for_model(**tree)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    byte_level(folder)
    return folder


def _adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """An adapter whose every weight is random: a fresh one has B = 0 and changes nothing."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **settings))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    wrapped.save_pretrained(folder)
    return folder


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def _unmerged(base: Path, adapter: Path) -> torch.Tensor:
    return _logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter))


def _plain(folder: Path) -> Any:
    """By transformers alone, all weights found and none left over."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


CASES = {
    "llama": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True}),
    "llama_dora_head": ("llama", {"target_modules": ["q_proj"], "use_dora": True, "modules_to_save": ["lm_head"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "tied": ("qwen2", {"target_modules": ["q_proj", "k_proj", "up_proj"], "bias": "lora_only"}),
    "tied_embedding": ("qwen2", {"target_modules": ["embed_tokens", "o_proj"]}),
    "tied_head": ("qwen2", {"target_modules": ["q_proj", "lm_head"]}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_merged_is_unmerged(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    family, settings = CASES[case]
    base, target = _base(tmp_path / "base", family), tmp_path / "merged"
    adapter = _adapter(base, tmp_path / "adapter", **settings)
    assert main(["merge", str(base), str(adapter), str(target)]) == 0
    found, expected, before = _logits(_plain(target)), _unmerged(base, adapter), _logits(_plain(base))
    assert (expected - before).abs().max() > 0.1, "an adapter that changes nothing would prove nothing"
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    is_tied = json.loads((target / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"]
    assert is_tied == (case in ("tied", "gpt2"))
    names = {path.name for path in target.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= names
    assert not any(name.startswith("adapter") for name in names) and not (tmp_path / "merged.partial").exists()
    shown = {name: tuple(tensor.shape) for name, tensor in load_file(target / "model.safetensors").items()}
    original = {name: tuple(tensor.shape) for name, tensor in load_file(base / "model.safetensors").items()}
    untied = (
        {"lm_head.weight": original["model.embed_tokens.weight"]} if case in ("tied_embedding", "tied_head") else {}
    )
    assert shown == original | untied
    err = capsys.readouterr().err
    assert "merging: " in err and "writing: " in err and "(100 %)" in err


@pytest.mark.parametrize("dtype", [None, "fp32", "bf16"])
def test_types(tmp_path: Path, dtype: str | None) -> None:
    """A base in bf16 stays one; each weight is the float32 sum, rounded once."""
    base = _base(tmp_path / "base", "llama", dtype=torch.bfloat16)
    adapter, target = _adapter(base, tmp_path / "adapter", target_modules=["v_proj", "embed_tokens"]), tmp_path / "m"
    assert main(["merge", str(base), str(adapter), str(target), *(["--dtype", dtype] if dtype else [])]) == 0
    expected = torch.float32 if dtype == "fp32" else torch.bfloat16
    found = load_file(target / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {expected}
    assert json.loads((target / "config.json").read_text(encoding="utf-8"))["dtype"] == str(expected).removeprefix(
        "torch."
    )
    weights, lora = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.v_proj"
    a, b = (lora[f"base_model.model.{name}.lora_{side}.weight"].float() for side in "AB")
    merged = weights[f"{name}.weight"].float() + 2 * (b @ a)
    if dtype != "fp32":
        assert torch.equal(found[f"{name}.weight"], merged.bfloat16())
    other = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(found[other], weights[other].to(expected))


def test_several_files_and_the_adapters_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_files, "_MAX_FILE_BYTES", 50_000)
    base, target = _base(tmp_path / "base", "gpt2"), tmp_path / "merged"
    adapter = _adapter(base, tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True)
    byte_level(adapter, bos=True)
    target.mkdir()
    assert main(["merge", str(base), str(adapter), str(target)]) == 0
    assert len(list(target.glob("model-*-of-*.safetensors"))) > 1 and (target / "model.safetensors.index.json").exists()
    assert (_logits(_plain(target)) - _unmerged(base, adapter)).abs().max() <= 1e-4
    assert (target / "tokenizer.json").read_bytes() == (adapter / "tokenizer.json").read_bytes()
    assert (target / "tokenizer.json").read_bytes() != (base / "tokenizer.json").read_bytes()


def test_what_the_base_has_beside_its_weights_comes_with_it(tmp_path: Path) -> None:
    """Also a generation_config.json that transformers refuses to write: a temperature without do_sample."""
    base, target = _base(tmp_path / "base", "llama"), tmp_path / "merged"
    adapter = _adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    generation = {"temperature": 0.6, "eos_token_id": [7, 0], "pad_token_id": 3}
    (base / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    (base / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/rag.jinja", "preprocessor_config.json", "LICENSE"):
        (base / name).write_text(f"{{# {name} #}}", encoding="utf-8")
    assert main(["merge", str(base), str(adapter), str(target)]) == 0
    for name in (
        "generation_config.json", "chat_template.jinja", "additional_chat_templates/rag.jinja", "LICENSE",
        "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    ):  # fmt: skip
        assert (target / name).read_bytes() == (base / name).read_bytes(), name


def test_a_base_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = _base(tmp_path / "base", "llama")
    adapter = _adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    (base / "merges.txt").write_text("of a tokenizer", encoding="utf-8")
    assert main(["merge", str(base), str(adapter), str(tmp_path / "merged")]) == 0
    assert f"neither {adapter} nor {base} has a tokenizer that can be read" in capsys.readouterr().out
    assert (tmp_path / "merged" / "merges.txt").exists() and (tmp_path / "merged" / "generation_config.json").exists()


def test_a_sharded_model_is_neither_merged_nor_sharded_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, sharded = _base(tmp_path / "base", "llama"), tmp_path / "sharded"
    adapter = _adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    assert main(["shard", str(base), str(sharded), "--tp-size", "1"]) == 0
    for words in (["merge", str(sharded), str(adapter)], ["shard", str(sharded), "--tp-size", "1"]):
        capsys.readouterr()
        assert main([*words, str(tmp_path / "new")]) == 2 and not (tmp_path / "new").exists()
        assert "sharded is a sharded model; use the model that it was made from" in capsys.readouterr().err


def test_the_tools_together(tmp_path: Path) -> None:
    """The merged model is not the base; merged twice it is the same, by ``verify``."""
    base = _base(tmp_path / "base", "llama")
    adapter = _adapter(base, tmp_path / "adapter", target_modules=["q_proj"])

    one, two = tmp_path / "one", tmp_path / "two"
    command = [sys.executable, str(ROOT / "tools" / "merge_lora.py"), str(base), str(adapter), str(one)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and f"merged {adapter} into {base}: {one}" in done.stdout, done.stderr
    assert main(["merge", str(base), str(adapter), str(two)]) == 0
    small = ["--rows", "1", "--greedy-tokens", "4"]
    assert main(["verify", str(one), str(two), *small]) == 0
    assert main(["verify", str(base), str(one), *small]) == 1


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    base = _base(folder / "base", "llama")
    return base, _adapter(base, folder / "adapter", target_modules=["q_proj", "v_proj"])


def _refused(base: Path, adapter: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The only line of error; the target is as it was."""
    before = sorted(target.parent.rglob("*"))
    assert main(["merge", str(base), str(adapter), str(target)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megadistill: ")]
    assert len(lines) == 1 and sorted(target.parent.rglob("*")) == before
    return lines[0]


def test_adapters_that_are_refused(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, good = pair
    target = tmp_path / "out" / "merged"
    target.parent.mkdir()
    assert "no such folder" in _refused(base, tmp_path / "nothing", target, capsys)
    adapter = tmp_path / "adapter"
    shutil.copytree(good, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))

    def refused_with(**changed: Any) -> str:
        (adapter / "adapter_config.json").write_text(json.dumps({**config, **changed}), encoding="utf-8")
        return _refused(base, adapter, target, capsys)

    assert "type IA3; only LORA" in refused_with(peft_type="IA3")
    assert "layer_replication" in refused_with(layer_replication=[[0, 2], [1, 2]])
    assert "does not fit" in refused_with(target_modules=["no_such_module"])
    (adapter / "adapter_config.json").write_text("{", encoding="utf-8")
    assert "adapter_config.json is damaged" in _refused(base, adapter, target, capsys)
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    assert "has no adapter_model.safetensors" in _refused(base, adapter, target, capsys)
    torch.save(tensors, adapter / "adapter_model.bin")
    assert "adapter_model.bin is a pickle" in _refused(base, adapter, target, capsys)
    first = min(tensors)
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != first}, adapter / "adapter_model.safetensors"
    )
    assert "1 weights missing" in _refused(base, adapter, target, capsys)
    save_file({**tensors, first: tensors[first] * float("nan")}, adapter / "adapter_model.safetensors")
    assert "cannot be merged: NaNs detected" in _refused(base, adapter, target, capsys)
    (adapter / "adapter_config.json").unlink()
    assert "no adapter_config.json" in _refused(base, adapter, target, capsys)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 64}, "size mismatch for base_model.model.model.layers.0.self_attn.q_proj"),
        ({"num_hidden_layers": 1}, "4 weights without a place in it, including model.layers.1."),
        ({"num_hidden_layers": 3}, "4 weights missing, including model.layers.2."),
    ],
)
def test_bases_of_other_shapes(
    pair: tuple[Path, Path], tmp_path: Path, change: dict[str, int], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """More or fewer layers of the same width, too: peft itself takes those and leaves weights out."""
    base = _base(tmp_path / "base", "llama", **change)
    (tmp_path / "out").mkdir()
    assert words in _refused(base, pair[1], tmp_path / "out" / "merged", capsys)


def test_targets_and_bases_that_are_refused(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = pair
    used, bare = tmp_path / "used", tmp_path / "bare"
    used.mkdir()
    (used / "file").write_text("x", encoding="utf-8")
    assert "is not an empty folder" in _refused(base, adapter, used, capsys)
    bare.mkdir()
    shutil.copy(base / "config.json", bare)
    assert "but no weights" in _refused(bare, adapter, tmp_path / "merged", capsys)
    assert "has no weights" in _refused(bare / "config.json", adapter, tmp_path / "merged", capsys)
