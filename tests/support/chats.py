"""A byte-level tokenizer with control tokens, and chat templates that behave as those of well-known models do."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megadistill.data.tokenize import load_tokenizer
from tests.support.tokenizers import TEXTS

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Qwen3's way: thoughts of earlier turns are left out, the last answer gets empty thoughts, and `enable_thinking=false`
# puts these into the prompt.
THINKING = """\
{%- if tools %}<|im_start|>system
Tools: {{ tools | tojson }}<|im_end|>
{% endif %}
{%- set last = namespace(user=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > last.user and (loop.last or message.reasoning_content) %}
{{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}
{%- endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}{{ '<tool_call>' + (call | tojson) + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>' + message.content + '</tool_response><|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
# ChatML, as Qwen2.5 has it.
CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# Llama 2's way: the answer ends in EOS, roles must alternate.
INST = """\
{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}
{%- else %}{{ ' ' + message.content + ' ' + eos_token }}{% endif %}
{%- endfor %}"""
# Writes no token at the end of a turn.
OPEN = """\
{%- for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""
TEMPLATES = {"thinking": THINKING, "chatml": CHATML, "inst": INST, "open": OPEN}


def chat_tokenizer(folder: Path, template: str | None = "thinking", *, eos: str = "<|im_end|>") -> Any:
    """A tokenizer in a folder, loaded as megadistill loads it; every call makes the same tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([*TEXTS, "user\n", "assistant\n", "system\n", "<think>\n\n</think>\n\n"] * 2, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos, pad_token="<|endoftext|>")
    if template is not None:
        tokenizer.chat_template = TEMPLATES[template]
    tokenizer.save_pretrained(folder)
    return load_tokenizer(folder)


def qwen3_pair(folder: Path, *, used: int = 151_669, rows: int = 151_936) -> dict[str, Any]:
    """A tiny Instruct pair with all that Qwen3 brings: FOLDER/teacher (untied), FOLDER/student (tied).

    A chat template with thoughts, two end tokens, a generation configuration, more vocabulary rows than tokens.

    Args:
        folder: Where the two model folders go.
        used: Tokens of the tokenizer.
        rows: Vocabulary rows of the models.

    Returns:
        The generation configuration.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = chat_tokenizer(folder / "small")
    state = json.loads((folder / "small" / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = {token: id_ for token, id_ in state["model"]["vocab"].items() if token not in SPECIAL}
    vocabulary = {token: place for place, token in enumerate(sorted(vocabulary, key=vocabulary.__getitem__))}
    added = [*SPECIAL, "<think>", "</think>"]
    first = used - len(added)
    vocabulary |= {f"unused {number}": number for number in range(len(vocabulary), first)}
    state["model"]["vocab"] = vocabulary
    kinds = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    state["added_tokens"] = [
        {"id": first + place, "content": token, "special": token in SPECIAL, **kinds}
        for place, token in enumerate(added)
    ]
    end, pad = first + SPECIAL.index("<|im_end|>"), first
    settings = {
        "eos_token_id": [end, pad], "pad_token_id": pad, "do_sample": True, "temperature": 0.6, "top_k": 20,
        "top_p": 0.95, "transformers_version": "4.51.0",
    }  # fmt: skip
    shape = {
        "vocab_size": rows, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.2,
        "eos_token_id": end, "bos_token_id": pad, "pad_token_id": None,
    }  # fmt: skip
    for role, hidden, is_tied in (("teacher", 24, False), ("student", 16, True)):
        target = folder / role
        torch.manual_seed(hidden)
        config = Qwen3Config(**shape, hidden_size=hidden, tie_word_embeddings=is_tied)
        Qwen3ForCausalLM(config).save_pretrained(target)
        tokenizer.save_pretrained(target)
        (target / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
        written = json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8"))
        written.pop("added_tokens_decoder", None)
        (target / "tokenizer_config.json").write_text(json.dumps(written), encoding="utf-8")
        (target / "generation_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return settings
