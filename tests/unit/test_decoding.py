"""Decoding with real decoders of every family against transformers' own generate, greedy, token for token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megadistill.data.sample import Sample
from megadistill.decoding.decoder import PlanDecoder, PlanPrefiller
from megadistill.decoding.hf_decoder import HFDecoder, make_decoder
from megadistill.decoding.kv_cache import KVCache, PrefillChunk
from megadistill.decoding.rollout import Correction, RolloutState, rollout
from megadistill.decoding.sampling import Sampling
from megadistill.models.families import FAMILIES
from megadistill.parallel import VocabShard
from tests.support.runs import FAMILY_CONFIGS

V, EOS, PAD, LIMIT = 97, 3, 0, 12
PROMPTS = ((5, 6, 7, 8, 9, 10), (11,), (12, 13, 14), (15, 16, 17, 18))
CPU, SHARD = torch.device("cpu"), VocabShard(0, V, V)
SAMPLES = [Sample(i, prompt) for i, prompt in enumerate(PROMPTS)]
GREEDY = Sampling(seed=0, temperature=0.0)
# (family, what differs from the family's usual configuration)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILY_CONFIGS},
    "llama with grouped heads": ("llama", {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "llama with llama3 positions": ("llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}}),
    "llama with yarn positions": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 16}}),
    "llama with dynamic positions": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4,
        "factor": 4.0}}),
    "llama with linear positions": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4,
        "factor": 4.0}}),
    "llama with long positions": ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4,
        "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [4.0, 8.0, 9.0, 12.0], "factor": 4.0,
        "original_max_position_embeddings": 32}}),
    "mistral without windows": ("mistral", {"sliding_window": None, "num_key_value_heads": 2}),
    "granite with grouped heads": ("granite", {"num_key_value_heads": 2}),
    "phi3 with long positions": ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4,
        "short_factor": [1.0, 2.0], "long_factor": [4.0, 8.0], "original_max_position_embeddings": 32},
        "original_max_position_embeddings": 32}),
    "phi3 with parts of heads": ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
        "partial_rotary_factor": 0.5}}),
    "phi3 with sliding windows": ("phi3", {"sliding_window": 4}),
    "gpt_neox in series": ("gpt_neox", {"use_parallel_residual": False}),
    "qwen3 with grouped heads": ("qwen3", {"num_key_value_heads": 1, "head_dim": 16}),
    "qwen2 with sliding windows": ("qwen2", {
        "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "layer_types": None}),
    "opt with norms last": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "gpt2 scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
}  # fmt: skip
# Those that only the family's own forward pass can run.
WITHOUT_PLAN = ("mistral", "gemma", "gemma2", "gemma3_text", "gpt_neox", "gpt_neox in series",
                "qwen2 with sliding windows", "opt with norms last", "gpt2 scaled by layer", "olmo2",
                "phi3 with parts of heads", "phi3 with sliding windows")  # fmt: skip


def make_model(variant: str, dtype: torch.dtype = torch.float32, **changed: Any) -> torch.nn.Module:
    family, more = VARIANTS[variant]
    tree = copy.deepcopy(FAMILY_CONFIGS[family]) | {"vocab_size": V, "hidden_size": 32, "word_embed_proj_dim": 32}
    if family != "opt":
        tree.pop("word_embed_proj_dim")
    if family == "gpt2":
        tree["n_embd"] = tree.pop("hidden_size")
    tree |= {"bos_token_id": 2, "eos_token_id": EOS, "pad_token_id": PAD, **more, **changed}
    config = AutoConfig.for_model(tree.pop("model_type"), **tree)
    config.initializer_range = config.init_std = 0.4
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().to(dtype)


def generated(model: torch.nn.Module, prompt: tuple[int, ...], limit: int = LIMIT) -> tuple[int, ...]:
    """transformers' greedy continuation."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False)
    return tuple(out[0, len(prompt) :].tolist())


def prepared(model: torch.nn.Module, variant: str) -> PlanDecoder | HFDecoder:
    family = FAMILIES[VARIANTS[variant][0]]
    if family.prepare is not None:
        family.prepare(model)
    return make_decoder(model, family.plan(model), SHARD, CPU)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("by_forward", [False, True])
def test_greedy_rollout_is_generate(variant: str, by_forward: bool) -> None:
    """The project's decoder where there is one, and every family's own forward pass over the same cache."""
    model = make_model(variant)
    expected = [generated(model, prompt) for prompt in PROMPTS]
    decoder = prepared(model, variant)
    assert isinstance(decoder, HFDecoder) == (variant in WITHOUT_PLAN)
    if by_forward:
        decoder = HFDecoder(model, CPU, decoder.head)
    limits = [LIMIT] * len(PROMPTS)
    for max_examples in (1, 3, 64):
        responses = rollout(
            decoder, SAMPLES, limits=limits, eos_ids=frozenset({EOS}), sampling=GREEDY, max_examples=max_examples
        )
        assert responses == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_continuing_is_generating_from_the_prefix(variant: str) -> None:
    """After corrections at different places, and again after later ones: as if nothing had been kept."""
    model = make_model(variant)
    rounds = [{0: (2, 50), 1: (7, 51), 3: (0, 52)}, {0: (5, 60), 1: (9, 61), 2: (1, 62), 3: (8, 63)}, {0: (11, 70)}]
    texts, expected_after = [generated(model, prompt) for prompt in PROMPTS], []
    for corrections in rounds:
        for i, (position, token) in corrections.items():
            if position < len(texts[i]):
                kept = (*texts[i][:position], token)
                left = LIMIT - len(kept)
                texts[i] = kept + (generated(model, PROMPTS[i] + kept, left) if left else ())
        expected_after.append(list(texts))
    decoder = prepared(model, variant)
    rollout_state = RolloutState(
        decoder, SAMPLES, limits=[LIMIT] * 4, eos_ids=frozenset({EOS}), sampling=GREEDY, keep_hidden=True
    )
    rollout_state.write(0)
    for corrections, expected in zip(rounds, expected_after, strict=True):
        lengths = [len(response) for response in rollout_state.responses()]
        rollout_state.rewrite([Correction(i, *at) for i, at in corrections.items() if at[0] < lengths[i]], 0)
        assert rollout_state.responses() == expected
    whole = decoder.read(
        [PrefillChunk(0, 0, (*p, *r[:-1])) for p, r in zip(PROMPTS, rollout_state.responses(), strict=True)]
    )
    for i, (prompt, states) in enumerate(zip(PROMPTS, whole, strict=True)):
        assert torch.allclose(rollout_state.hidden(i), states[len(prompt) - 1 :], atol=1e-4), "kept hidden states"


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant not in WITHOUT_PLAN])
def test_reading_is_the_familys_forward(variant: str) -> None:
    """Hidden states of whole examples and of the ends of kept ones.

    In float64, but transformers' RMS norms and rotary positions go through float32.
    """
    model = make_model(variant, torch.float64)
    family = FAMILIES[VARIANTS[variant][0]]
    if family.prepare is not None:
        family.prepare(model)
    with torch.no_grad():
        expected = [model.base_model(torch.tensor([prompt])).last_hidden_state[0] for prompt in PROMPTS]
    plan = family.plan(model)
    assert plan is not None
    prefiller = PlanPrefiller(plan, SHARD, CPU)
    fresh = prefiller.read([PrefillChunk(i, 0, prompt) for i, prompt in enumerate(PROMPTS)])
    state = prefiller.new_state([0] * 4, 8)
    assert isinstance(state, KVCache)
    first = prefiller.read([PrefillChunk(i, 0, prompt[:1]) for i, prompt in enumerate(PROMPTS)], state)
    rest = prefiller.read([PrefillChunk(i, 1, p[1:]) for i, p in enumerate(PROMPTS) if len(p) > 1], state)
    rest.insert(1, first[1][:0])
    close = 1e-12 if variant in ("opt", "gpt2") else 3e-6
    for i, states in enumerate(expected):
        assert torch.allclose(fresh[i], states, atol=close)
        assert torch.allclose(torch.cat([first[i], rest[i]]), fresh[i], atol=1e-12)
    assert prefiller.read([]) == []


def test_long_chunks_run_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    prefiller = prepared(make_model("llama", torch.float64), "llama")
    chunks = [PrefillChunk(i, 0, prompt) for i, prompt in enumerate(PROMPTS)]
    whole = prefiller.read(chunks)
    monkeypatch.setattr("megadistill.decoding.decoder._MAX_TOKENS", 3)
    for states, expected in zip(prefiller.read(chunks), whole, strict=True):
        assert torch.allclose(states, expected, atol=1e-12)


@pytest.mark.parametrize("variant", list(FAMILY_CONFIGS))
def test_bf16_decoding_stays_close(variant: str) -> None:
    """Half precision takes other branches of the decoder: hidden states of a decoded example against float64."""
    wide = prepared(make_model(variant, torch.float64), variant)
    narrow = prepared(make_model(variant).to(torch.bfloat16), variant)
    for model in (wide, narrow):
        rollout_state = RolloutState(
            model, SAMPLES, limits=[LIMIT] * 4, eos_ids=frozenset(), sampling=Sampling(0), keep_hidden=True
        )
        rollout_state.write(0)
        states = model.read([PrefillChunk(0, 0, (*PROMPTS[0], *rollout_state.responses()[0][:-1]))])[0]
        close = 0.2 if model is narrow else 1e-5 if variant == "gemma2" else 1e-9  # eager attention is in float32
        assert torch.allclose(
            rollout_state.hidden(0).double(), states[len(PROMPTS[0]) - 1 :].double(), atol=close, rtol=close
        )
