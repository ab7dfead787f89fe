"""What is no supported family: the line with its reason, and what to do about a multimodal model."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedConfig,
)

from megadistill.demo.tokenizer import train_tokenizer
from megadistill.errors import ConfigError
from megadistill.models.families import FAMILIES, family_of
from megadistill.models.loading import load_model_config
from tests.support.runs import ROOT

TEXT = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Gemma3Config(text_config=TEXT, vision_config=VISION), "it does not only read text; write its text part to a"),
        (AutoConfig.for_model("mixtral"), "nothing here divides a mixture of experts"),
        (AutoConfig.for_model("qwen3_moe"), "nothing here divides a mixture of experts"),
        (AutoConfig.for_model("t5"), "it has an encoder: it does not continue a text"),
        (AutoConfig.for_model("mamba"), "it has no attention heads to divide"),
        (AutoConfig.for_model("phi"), "nothing here knows how to divide its layers"),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else "",
)
def test_a_family_is_refused_with_the_reason(config: PreTrainedConfig, reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        family_of(config, "--model")
    line = str(error.value)
    assert line.startswith(f"--model: model type '{config.model_type}' is not supported: {reason}") and "\n" not in line
    assert line.endswith(f"; allowed: {', '.join(sorted(FAMILIES))}")


def test_the_documented_lines_write_the_text_part(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = Gemma3ForConditionalGeneration(Gemma3Config(text_config=TEXT, vision_config=VISION)).eval()
    whole.save_pretrained(tmp_path / "whole")
    train_tokenizer(["a text of a few words"] * 9, tmp_path / "whole", vocab_size=300)
    page = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    lines = page.split("<<'END'\n")[1].split("    END\n")[0]
    paths = {"google/gemma-3-4b-it": tmp_path / "whole", "models/gemma-3-4b-text": tmp_path / "text"}
    for name, path in paths.items():
        assert name in lines
        lines = lines.replace(name, str(path))
    exec(textwrap.dedent(lines), {})
    assert load_model_config(str(tmp_path / "text"), "--model").model_type == "gemma3_text"
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    tokens = torch.arange(4, 20)[None]
    assert torch.equal(text(input_ids=tokens).logits, whole(input_ids=tokens).logits)
