"""Decoding with real decoders of every family against transformers' own generate, greedy, token for token."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megadistill.engines.decode_graph import DecodeGraph, Place
from megadistill.engines.decoder import PlanReader, PlanWriter
from megadistill.engines.kv_cache import KVCache, Reading
from megadistill.engines.step_model import HFStepModel, step_model
from megadistill.generation.protocols import Correction, Rows, Sampling
from megadistill.generation.rollout import Draft, rollout
from megadistill.models.families import FAMILIES
from megadistill.parallel import VocabShard
from tests.support.runs import FAMILY_CONFIGS

V, EOS, PAD, LIMIT = 97, 3, 0, 12
PROMPTS = ((5, 6, 7, 8, 9, 10), (11,), (12, 13, 14), (15, 16, 17, 18))
CPU, SHARD = torch.device("cpu"), VocabShard(0, V, V)
ROWS = Rows(tuple(range(len(PROMPTS))), PROMPTS, ((),) * len(PROMPTS))
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
    "qwen3 with grouped heads": ("qwen3", {"num_key_value_heads": 1, "head_dim": 16}),
    "qwen2 with sliding windows": ("qwen2", {
        "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "layer_types": None}),
    "opt with norms behind": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "gpt2 scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
}  # fmt: skip
# Those that only the family's own forward pass can run.
WITHOUT_PLAN = ("qwen2 with sliding windows", "opt with norms behind", "gpt2 scaled by layer")


def make_model(variant: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    family, more = VARIANTS[variant]
    tree = copy.deepcopy(FAMILY_CONFIGS[family]) | {"vocab_size": V, "hidden_size": 32, "word_embed_proj_dim": 32}
    if family != "opt":
        tree.pop("word_embed_proj_dim")
    if family == "gpt2":
        tree["n_embd"] = tree.pop("hidden_size")
    tree |= {"bos_token_id": 2, "eos_token_id": EOS, "pad_token_id": PAD, **more}
    config = AutoConfig.for_model(tree.pop("model_type"), **tree)
    config.initializer_range = config.init_std = 0.4
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().to(dtype)


def generated(model: torch.nn.Module, prompt: tuple[int, ...], limit: int = LIMIT) -> tuple[int, ...]:
    """transformers' greedy continuation."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False)
    return tuple(out[0, len(prompt) :].tolist())


def prepared(model: torch.nn.Module, variant: str) -> PlanWriter | HFStepModel:
    family = FAMILIES[VARIANTS[variant][0]]
    if family.prepare is not None:
        family.prepare(model)
    return step_model(model, family.plan(model), SHARD, CPU)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("by_forward", [False, True])
def test_greedy_rollout_is_generate(variant: str, by_forward: bool) -> None:
    """The project's decoder where there is one, and every family's own forward pass over the same cache."""
    model = make_model(variant)
    expected = tuple(generated(model, prompt) for prompt in PROMPTS)
    writer = prepared(model, variant)
    assert isinstance(writer, HFStepModel) == (variant in WITHOUT_PLAN)
    if by_forward:
        writer = HFStepModel(model, SHARD, CPU, writer.head)
    limits = [LIMIT] * len(PROMPTS)
    for max_rows in (1, 3, 64):
        found = rollout(writer, ROWS, limits=limits, eos_ids=frozenset({EOS}), sampling=GREEDY, max_rows=max_rows)
        assert found.responses == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_writing_on_is_generating_from_the_prefix(variant: str) -> None:
    """After corrections at different places, and again after later ones: as if nothing had been kept."""
    model = make_model(variant)
    rounds = [{0: (2, 50), 1: (7, 51), 3: (0, 52)}, {0: (5, 60), 1: (9, 61), 2: (1, 62), 3: (8, 63)}, {0: (11, 70)}]
    texts, drafts = [generated(model, prompt) for prompt in PROMPTS], []
    for corrections in rounds:
        for row, (position, token) in corrections.items():
            if position < len(texts[row]):
                kept = (*texts[row][:position], token)
                left = LIMIT - len(kept)
                texts[row] = kept + (generated(model, PROMPTS[row] + kept, left) if left else ())
        drafts.append(list(texts))
    writer = prepared(model, variant)
    draft = Draft(writer, ROWS, limits=[LIMIT] * 4, eos_ids=frozenset({EOS}), sampling=GREEDY, keep_hidden=True)
    draft.write(0)
    for corrections, expected in zip(rounds, drafts, strict=True):
        lengths = [len(response) for response in draft.rows.responses]
        draft.rewrite([Correction(row, *at) for row, at in corrections.items() if at[0] < lengths[row]], 0)
        assert draft.rows.responses == tuple(expected)
    whole = writer.read([Reading(0, 0, (*p, *r[:-1])) for p, r in zip(PROMPTS, draft.rows.responses, strict=True)])
    for row, (prompt, states) in enumerate(zip(PROMPTS, whole, strict=True)):
        assert torch.allclose(draft.hidden(row), states[len(prompt) - 1 :], atol=1e-4), "kept hidden states"


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant not in WITHOUT_PLAN])
def test_reading_is_the_familys_forward(variant: str) -> None:
    """Hidden states, whole rows and the ends of kept ones. In float64, but transformers' RMS norms and rotary positions
    go through float32."""
    model = make_model(variant, torch.float64)
    family = FAMILIES[VARIANTS[variant][0]]
    if family.prepare is not None:
        family.prepare(model)
    with torch.no_grad():
        expected = [model.base_model(torch.tensor([prompt])).last_hidden_state[0] for prompt in PROMPTS]
    plan = family.plan(model)
    assert plan is not None
    reader = PlanReader(plan, SHARD, CPU)
    fresh = reader.read([Reading(row, 0, prompt) for row, prompt in enumerate(PROMPTS)])
    state = reader.new_state([0] * 4, 8)
    assert isinstance(state, KVCache)
    first = reader.read([Reading(row, 0, prompt[:1]) for row, prompt in enumerate(PROMPTS)], state)
    rest = reader.read([Reading(row, 1, p[1:]) for row, p in enumerate(PROMPTS) if len(p) > 1], state)
    rest.insert(1, first[1][:0])
    close = 1e-12 if variant in ("opt", "gpt2") else 3e-6
    for row, states in enumerate(expected):
        assert torch.allclose(fresh[row], states, atol=close)
        assert torch.allclose(torch.cat([first[row], rest[row]]), fresh[row], atol=1e-12)
    assert reader.read([]) == []


def test_long_readings_are_cut_into_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = prepared(make_model("llama", torch.float64), "llama")
    readings = [Reading(row, 0, prompt) for row, prompt in enumerate(PROMPTS)]
    whole = reader.read(readings)
    monkeypatch.setattr("megadistill.engines.decoder._MAX_TOKENS", 3)
    for states, expected in zip(reader.read(readings), whole, strict=True):
        assert torch.allclose(states, expected, atol=1e-12)


@pytest.mark.parametrize("variant", list(FAMILY_CONFIGS))
def test_bf16_decoding_stays_close(variant: str) -> None:
    """Half precision goes other ways through the decoder: hidden states of a decoded row against float64."""
    wide = prepared(make_model(variant, torch.float64), variant)
    narrow = prepared(make_model(variant).to(torch.bfloat16), variant)
    for model in (wide, narrow):
        draft = Draft(model, ROWS, limits=[LIMIT] * 4, eos_ids=frozenset(), sampling=Sampling(0), keep_hidden=True)
        draft.write(0)
        states = model.read([Reading(0, 0, (*PROMPTS[0], *draft.rows.responses[0][:-1]))])[0]
        close = 1e-9 if model is wide else 0.2
        assert torch.allclose(draft.hidden(0).double(), states[len(PROMPTS[0]) - 1 :].double(), atol=close, rtol=close)


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant not in WITHOUT_PLAN])
def test_the_step_that_is_recorded_on_gpus_is_the_step(variant: str) -> None:
    """All slots take part in it; what is not being decoded keeps all that is ever read of it."""
    writer = prepared(make_model(variant, torch.float64), variant)
    assert isinstance(writer, PlanWriter)
    width = max(map(len, PROMPTS))
    offsets = [width - len(prompt) for prompt in PROMPTS]
    shape = (writer.num_kv_heads, width + 3, writer.plan.head_dim)
    states = [
        KVCache(len(writer.plan.layers), offsets, shape, writer.dtype, CPU, has_spare=spare) for spare in (False, True)
    ]
    for state in states:
        writer.prefill(state, PROMPTS)
    plain, spare = states
    assert spare.spare is not None and spare.layers[0].shape[3] == spare.spare + 1 == 17
    writer._turns(spare.spare, 0)
    for step, tokens in enumerate(([20, 21, 22, 23], [30, 31, 32], [40, 41, 42])):
        if step == 2:
            for state in states:
                state.swap(0, 3)
                state.sort([1, 0, 3, 2])
        kept = [layer.clone() for layer in spare.layers]
        column, active = width + step, torch.tensor(tokens)
        starts = spare.starts()
        assert starts is not None
        filled = torch.cat([active, torch.zeros(len(PROMPTS) - len(tokens), dtype=torch.int64)])
        place = Place(filled, starts, torch.tensor(column), torch.tensor(len(tokens)))
        hidden = writer._decode_all(spare, place)[: len(tokens)]
        torch.testing.assert_close(hidden, writer.decode(plain, active, column), rtol=1e-9, atol=1e-9)
        for layer, before in zip(spare.layers, kept, strict=True):
            assert torch.equal(layer[:, len(tokens) :, :, :-1], before[:, len(tokens) :, :, :-1])


class _ReplayedByHand:
    """As much of CUDA's graphs and streams as a recording on the CPU needs."""

    def capture_begin(self, **_: Any) -> None: ...

    def capture_end(self) -> None: ...

    def replay(self) -> None: ...

    def wait_stream(self, _: Any) -> None: ...


def test_a_recorded_step_does_not_keep_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else caches would wait for the garbage collector: they are most of what a rollout holds."""
    for name in ("CUDAGraph", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: _ReplayedByHand())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    writer = prepared(make_model("llama", torch.float64), "llama")
    assert isinstance(writer, PlanWriter)
    shape = (writer.num_kv_heads, 8, writer.plan.head_dim)
    state = KVCache(len(writer.plan.layers), [1, 0], shape, writer.dtype, CPU, has_spare=True)
    writer._turns(8, 0)
    state.recorded = DecodeGraph(partial(writer._decode_all, state), 2, writer._table)
    found = state.recorded.replay(torch.tensor([7]), 3, state.starts())
    assert found.shape == (1, 32) and state.recorded._place.starts.tolist() == [1, 0]
    kept = weakref.ref(state)
    gc.disable()
    try:
        del state
        assert kept() is None
    finally:
        gc.enable()
