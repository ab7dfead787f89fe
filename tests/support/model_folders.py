"""Small model folders, as users have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megadistill.models.shards import ShardReader
from tests.support.tokenizers import byte_level

SIZES = {
    "vocab_size": 504, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def llama_folder(folder: Path, *, seed: int = 1, **more: Any) -> Path:
    """A model with random weights and its tokenizer; ``more`` is of its configuration."""
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**{**SIZES, **more})).save_pretrained(folder)
    byte_level(folder)
    return folder


def configure(folder: Path, **more: Any) -> Path:
    """Changes entries of config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | more), encoding="utf-8")
    return folder


def is_tied(folder: Path) -> bool:
    """What config.json says, which must be what the file holds."""
    says = json.loads((folder / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"]
    if (folder / "shards").is_dir():
        assert says == (HEAD not in ShardReader(folder / "shards").shard_specs)
    else:
        assert says == (HEAD not in load_file(folder / "model.safetensors"))
    return bool(says)


def adapter_folder(base: Path, folder: Path) -> Path:
    """A LoRA adapter of a model."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder
