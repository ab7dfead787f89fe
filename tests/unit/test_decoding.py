"""Decoding with real decoders of every family against transformers' own generate, greedy, token for token."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megadistill.engines.step_model import HFStepModel
from megadistill.generation.protocols import Rows, Sampling
from megadistill.generation.rollout import rollout
from megadistill.models.families import FAMILIES
from megadistill.parallel import VocabShard
from tests.support.runs import FAMILY_CONFIGS

V, EOS, PAD = 97, 3, 0
PROMPTS = ((5, 6, 7, 8, 9, 10), (11,), (12, 13, 14), (15, 16, 17, 18))


@pytest.mark.parametrize("family", list(FAMILY_CONFIGS))
def test_greedy_rollout_is_generate(family: str) -> None:
    tree = copy.deepcopy(FAMILY_CONFIGS[family])
    config = AutoConfig.for_model(
        tree.pop("model_type"), vocab_size=V, **tree, bos_token_id=2, eos_token_id=EOS, pad_token_id=PAD
    )
    if family in ("llama", "qwen2", "qwen3"):
        config.hidden_size = 32
    if family == "gpt2":
        config.n_embd = 32
    if family == "opt":
        config.hidden_size = config.word_embed_proj_dim = 32
    config.initializer_range = config.init_std = 0.4
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        expected.append(tuple(out[0, len(prompt) :].tolist()))
    if FAMILIES[family].prepare is not None:
        FAMILIES[family].prepare(model)
    found = rollout(
        HFStepModel(model, VocabShard(0, V, V), torch.device("cpu")),
        Rows(tuple(range(len(PROMPTS))), PROMPTS, ((),) * len(PROMPTS)),
        limits=[12] * len(PROMPTS),
        eos_ids=frozenset({EOS}),
        pad_id=PAD,
        sampling=Sampling(seed=0, temperature=0.0),
    )
    assert found.responses == tuple(expected)
