"""What a model may be named as, and what is read of it before it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig

from megadistill.errors import ConfigError
from megadistill.models.loading import load_model, load_model_config, shared_vocab_size, whole_model
from megadistill.models.positions import check_positions

TINY = {"vocab_size": 12, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_hub_names_are_looked_up_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NAME as well as OWNER/NAME, as for tokenizers."""
    asked: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megadistill.models.loading.offline_if_needed", asked.extend)
    config = GPT2Config(**TINY)
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda path, **options: (asked.append(path), config)[1])
    assert load_model_config(name, "model.student.path").model_type == "gpt2"
    assert asked == [name, name]


def test_paths_that_do_not_exist_are_not_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda path, **options: pytest.fail(f"looked for {path}"))
    (tmp_path / "teacher").mkdir()
    with pytest.raises(ConfigError, match=r"^model\.teacher\.path: no such .*; did you mean .*/teacher\?$"):
        load_model_config(str(tmp_path / "techer"), "model.teacher.path")
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        load_model_config(str(tmp_path / "teacher"), "model.teacher.path")


def test_padded_rows_are_removed(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(**TINY)).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype="fp32", vocab_size=10, seed=0, attention="sdpa", where="x")
    assert loaded.shapes["transformer.wte.weight"] == (10, 8)
    assert {name: tuple(rows.shape) for name, rows in loaded.removed_rows.items()} == {"transformer.wte.weight": (2, 8)}
    assert loaded.config.vocab_size == 12, "the configuration of exports"
    with pytest.raises(ConfigError, match="12 vocabulary rows, the tokenizer needs 13"):
        load_model(str(tmp_path), dtype="fp32", vocab_size=13, seed=0, attention="sdpa", where="x")


def test_random_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    GPT2Config(**TINY).save_pretrained(tmp_path)
    file = str(tmp_path / "config.json")

    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(torch.seed())
        loaded = load_model(file, dtype="fp32", vocab_size=12, seed=seed, attention="sdpa", where="x")
        model = whole_model(loaded, torch.device("cpu"))
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    assert torch.equal(weights(3), weights(3)) and not torch.equal(weights(3), weights(4))


def test_numbers_that_do_not_fit() -> None:
    check_positions(GPT2Config(**TINY), 8, "data.max_tokens", "x")
    with pytest.raises(ConfigError, match="data.max_tokens=9.* 8 positions"):
        check_positions(GPT2Config(**TINY), 9, "data.max_tokens", "x")
    rotary = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8,
              "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}  # fmt: skip
    long = LlamaConfig(hidden_size=32, num_attention_heads=4, max_position_embeddings=32, rope_parameters=rotary)
    check_positions(long, 8, "data.max_tokens", "x")
    with pytest.raises(ConfigError, match="data.max_tokens=9, but x has .* longrope, .* up to 8 tokens"):
        check_positions(long, 9, "data.max_tokens", "x")
    assert shared_vocab_size(None, 12, [10]) == shared_vocab_size(12, 16, [10]) == 10
    assert shared_vocab_size(11, 16, [12, 10]) == 11 and shared_vocab_size(16, 16, [10, 12]) == 12
    with pytest.raises(ConfigError, match="model.teacher: 9 vocabulary rows"):
        shared_vocab_size(9, 12, [10])


def test_only_weights_that_never_came_are_not_copied() -> None:
    """An address that a freed weight had may be a real tensor's later, on some ranks only."""
    from megadistill.engines.empty_weights import NothingToCopy

    memory = bytearray(2_400)
    layer = torch.nn.Linear(20, 30, bias=False)
    layer.weight.data = torch.frombuffer(memory, dtype=torch.float32).view(30, 20)
    with NothingToCopy(layer):
        assert layer.weight.data.view(torch.uint8).numel() == 0
        sliced = layer.weight.data[:10].to("cpu", copy=True)
        assert sliced.shape == (10, 20) and sliced.view(torch.uint8).numel() == 0
        address = layer.weight.data_ptr()
        layer.weight.data = torch.empty(0)
        later = torch.frombuffer(memory, dtype=torch.float32).fill_(1.0).view(30, 20)
        assert later.data_ptr() == address and later.view(torch.uint8).numel() == 2_400
        assert torch.equal(later.to("cpu", copy=True), later)
