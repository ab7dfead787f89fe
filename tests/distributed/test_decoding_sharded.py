"""Decoding across shards: every family sharded over 2, 3 and 4 ranks (uneven vocabularies) against one process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megadistill.data.sample import Sample
from megadistill.decoding.decoder import PlanDecoder
from megadistill.decoding.kv_cache import PrefillChunk
from megadistill.decoding.products import ProductLayouts
from megadistill.decoding.rollout import Correction, RolloutState
from megadistill.decoding.sampling import Sampling
from megadistill.decoding.token_steps import Stepping
from tests.support.runs import FAMILY_CONFIGS, join_deepspeed
from tests.support.spawn import run_ranks

V, EOS, LIMIT, HEADS = 97, 3, 10, 12
CHOSEN = ProductLayouts("transposed", "packed", "transposed", "transposed", "transposed", "plain")
PROMPTS = ((5, 6, 7, 8, 9, 90), (96,), (12, 50, 14), (15, 66, 17, 18))
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILY_CONFIGS},
    **{family: (family, {"num_attention_heads": 2 * HEADS}) for family in ("olmo2", "phi3")},
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "qwen3, forward": ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
}


def _write(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    for name, (family, more) in VARIANTS.items():
        tree = copy.deepcopy(FAMILY_CONFIGS[family]) | {"vocab_size": V + 4}
        tree |= {key: HEADS for key in ("num_attention_heads", "num_key_value_heads", "n_head") if key in tree}
        tree |= more
        tree |= {"n_embd": 48} if family == "gpt2" else {"hidden_size": 48}
        if family == "opt":
            tree["word_embed_proj_dim"] = 48
        config = AutoConfig.for_model(tree.pop("model_type"), **tree)
        config.initializer_range = config.init_std = 0.3
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)


def _decode(folder: Path, tp_size: int, zero_stage: int) -> dict[str, Any]:
    """Tokens of a sampled rollout, of a correction behind it and of a greedy rollout, and the prefiller's states.

    On several ranks products are in the layout that rank 0 chooses, another one than that of one process.
    """
    from megadistill.engines import partitioned
    from megadistill.engines.inference import open_model
    from megadistill.engines.partitioned import frozen_model
    from megadistill.models.loading import load_model
    from megadistill.parallel.context import ParallelContext

    results: dict[str, Any] = {}
    samples = [Sample(i, prompt) for i, prompt in enumerate(PROMPTS)]
    for name in VARIANTS:
        path = str(folder / name)
        if tp_size == 1:
            context = ParallelContext.single()
            with open_model(path, context, vocab_size=V, where=name) as decoder:
                results[name] = (*_rollouts(decoder, samples), [hidden[:, :4] for hidden in decoder.read(_chunks())])
            continue
        context = ParallelContext.build(tp_size, 60, torch.device("cpu"))
        loaded = load_model(path, dtype="fp32", vocab_size=V, seed=0, attention="sdpa", where=name)
        chosen = CHOSEN if context.rank == 0 else None
        with patch.object(partitioned, "choose_layouts", Mock(return_value=chosen)):
            model = frozen_model(loaded, context, zero_stage=zero_stage, dtype="fp32")
        assert model._layouts == CHOSEN
        states = model.prefiller(2).read(_chunks())
        with model.decoder() as decoder:
            results[name] = (*_rollouts(decoder, samples), [hidden[:, :4] for hidden in states])
            if tp_size == 2 and isinstance(decoder, PlanDecoder):
                _assert_static_steps_write_the_same(decoder, samples, results[name][:-1])
    return results


def _assert_static_steps_write_the_same(decoder: PlanDecoder, samples: list[Sample], expected: tuple[Any, ...]) -> None:
    """As a recording on GPUs would: steps of fixed shapes, several between two looks, collectives among them."""
    for stepping in (Stepping(1, is_static=True), Stepping(3, is_static=True, rounded=max), Stepping(8)):
        static = PlanDecoder(decoder.plan, decoder.device, decoder.head, CHOSEN, stepping)
        assert _rollouts(static, samples) == expected, stepping


def _chunks() -> list[PrefillChunk]:
    return [PrefillChunk(slot, 0, prompt) for slot, prompt in enumerate(PROMPTS)]


def _rollouts(decoder: Any, samples: list[Sample]) -> tuple[Any, ...]:
    texts = []
    for temperature in (1.0, 0.0):
        sampling = Sampling(5, temperature)
        rollout_state = RolloutState(
            decoder, samples, limits=[LIMIT, 4, LIMIT, LIMIT], eos_ids=frozenset({EOS}), sampling=sampling
        )
        rollout_state.write(0)
        texts.append(rollout_state.responses())
        lengths = [len(response) for response in rollout_state.responses()]
        rollout_state.rewrite([Correction(i, min(n - 1, 2 * i), 40) for i, n in enumerate(lengths)], 1)
        texts.append(rollout_state.responses())
    return tuple(texts)


def _decode_in_half_precision(rank: int, folder: Path) -> bool:
    from megadistill.engines.partitioned import frozen_model
    from megadistill.models.loading import load_model
    from megadistill.parallel.context import ParallelContext

    join_deepspeed(rank)
    context = ParallelContext.build(2, 60, torch.device("cpu"))
    samples = [Sample(i, prompt) for i, prompt in enumerate(PROMPTS)]
    for name in ("llama", "opt"):
        path = str(folder / name)
        loaded = load_model(path, dtype="bf16", vocab_size=V, seed=0, attention="sdpa", where=name)
        with frozen_model(loaded, context, zero_stage=0, dtype="bf16").decoder() as decoder:
            assert isinstance(decoder, PlanDecoder) and decoder.dtype == torch.bfloat16
            with sdpa_kernel(SDPBackend.MATH):  # the usual one rounds by the number of columns
                _assert_static_steps_write_the_same(decoder, samples, _rollouts(decoder, samples))
    return True


def _on_rank(rank: int, folder: Path, tp_size: int, zero_stage: int) -> dict[str, Any]:
    join_deepspeed(rank)
    return _decode(folder, tp_size, zero_stage)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    _write(folder)
    return folder


@pytest.fixture(scope="module")
def expected(models: Path) -> dict[str, Any]:
    return _decode(models, 1, 0)


@pytest.mark.parametrize(("tp_size", "zero_stage"), [(2, 3), (3, 0), (4, 0)])
def test_shards_write_and_read_as_one_process(
    models: Path, expected: dict[str, Any], tp_size: int, zero_stage: int
) -> None:
    import deepspeed  # noqa: F401  imported once, before the forks

    for results in run_ranks(_on_rank, tp_size, models, tp_size, zero_stage):
        for name in VARIANTS:
            assert results[name][:-1] == expected[name][:-1], name
            for ours, theirs in zip(results[name][-1], expected[name][-1], strict=True):
                assert torch.allclose(ours, theirs, atol=2e-5), name


def test_static_steps_in_half_precision(models: Path) -> None:
    import deepspeed  # noqa: F401  imported once, before the forks

    assert run_ranks(_decode_in_half_precision, 2, models) == [True, True]
