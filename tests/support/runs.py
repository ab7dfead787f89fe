"""Whole training runs inside a forked gloo job: many runs a launch, so that a layout costs one start-up."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.support.preload import preload
from tests.support.spawn import run_ranks

ROOT = Path(__file__).parents[2]
HEADS = 4
VOCABULARY = 403
COMMON = {"num_attention_heads": HEADS, "max_position_embeddings": 128}
GROUPED = {"num_attention_heads": 2 * HEADS}
LLAMA_LIKE = {**COMMON, "intermediate_size": 48, "num_hidden_layers": 2, "num_key_value_heads": HEADS}
FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **LLAMA_LIKE, "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", **LLAMA_LIKE, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **LLAMA_LIKE, "head_dim": 8, "tie_word_embeddings": False},
    "mistral": {"model_type": "mistral", **LLAMA_LIKE, "head_dim": 8, "sliding_window": 8,
        "tie_word_embeddings": False},
    "smollm3": {"model_type": "smollm3", **LLAMA_LIKE, "no_rope_layers": [1, 0], "tie_word_embeddings": True,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    "granite": {"model_type": "granite", **LLAMA_LIKE, "tie_word_embeddings": True, "logits_scaling": 2.5,
        "embedding_multiplier": 3.0, "residual_multiplier": 0.6, "attention_multiplier": 0.2},
    "gemma": {"model_type": "gemma", **LLAMA_LIKE, "head_dim": 8, "hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", **LLAMA_LIKE, "head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 8,
        "final_logit_softcapping": 4.0, "attn_logit_softcapping": 3.0, "tie_word_embeddings": True},
    "gemma3_text": {"model_type": "gemma3_text", **LLAMA_LIKE, "head_dim": 8, "query_pre_attn_scalar": 12,
        "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True},
    "olmo2": {"model_type": "olmo2", **LLAMA_LIKE, **GROUPED, "tie_word_embeddings": False},
    "phi3": {"model_type": "phi3", **LLAMA_LIKE, **GROUPED, "tie_word_embeddings": False, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0},
    "gpt_neox": {"model_type": "gpt_neox", **COMMON, "intermediate_size": 48, "num_hidden_layers": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        "tie_word_embeddings": False},
    "opt": {"model_type": "opt", **COMMON, "ffn_dim": 48, "num_hidden_layers": 2, "word_embed_proj_dim": 32},
    "gpt2": {"model_type": "gpt2", "n_head": HEADS, "n_layer": 2, "n_positions": 128},
}  # fmt: skip

# ZeRO-3 as with a large model: nothing stays whole, and every layer is released after its forward and backward pass.
LARGE_MODEL = (
    "parallel.zero.max_reuse_distance=0",
    "parallel.zero.param_persistence_threshold=0",
    "parallel.zero.max_live_parameters=0",
    "parallel.zero.prefetch_bucket_size=1000",
    "parallel.zero.reduce_bucket_size=1000",
)


def write_assets(folder: Path) -> None:
    """A small corpus, a tokenizer of an odd size (uneven shards at every tp) and model configurations of all
    families."""
    from megadistill.data.synthetic import CorpusSizes, generate_corpus, write_corpus
    from megadistill.data.tokenize import load_tokenizer
    from megadistill.demo.tokenizer import train_tokenizer

    corpus = generate_corpus(3, CorpusSizes(teacher=150, references=24, prompts=24, valid=12, test=12))
    write_corpus(folder / "data", corpus)
    texts = [f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in corpus["teacher_train"]]
    train_tokenizer(texts, folder / "tokenizer", vocab_size=VOCABULARY)
    size = len(load_tokenizer(folder / "tokenizer"))
    assert size % 2 and size % 3 and size % 4
    for family, config in FAMILY_CONFIGS.items():
        for role, hidden in (("teacher", 48), ("student", 32)):
            # Padded rows beyond the tokenizer, of different numbers: they are removed on both sides.
            rows = size + (5 if role == "teacher" else 2)
            width = {"n_embd": hidden} if family == "gpt2" else {"hidden_size": hidden}
            if family == "opt":
                width["word_embed_proj_dim"] = hidden
            model = folder / family / role
            model.mkdir(parents=True)
            # Wide initial weights: distributions that are far from uniform, so that wrong tokens would show.
            tree = {**config, **width, "vocab_size": rows, "initializer_range": 0.2, "init_std": 0.2}
            (model / "config.json").write_text(json.dumps(tree), encoding="utf-8")


def settings(assets: Path, family: str, *more: str) -> list[str]:
    """Overrides that make a short on-policy run with every part switched on."""
    return [
        f"model.teacher.path={assets / family / 'teacher' / 'config.json'}",
        f"model.student.path={assets / family / 'student' / 'config.json'}",
        f"model.tokenizer={assets / 'tokenizer'}",
        f"data.train_path={assets / 'data' / 'train.jsonl'}",
        f"data.prompts_path={assets / 'data' / 'prompts.jsonl'}",
        "data.prompts_ratio=0.5",
        "data.template=plain",
        "data.max_prompt_tokens=64",
        "data.max_tokens=84",
        "generation.max_new_tokens=8",
        "train.global_batch_size=4",
        "train.micro_batch_size=1",
        "train.samples_every=1",
        "train.samples_rows=4",
        "optim.lr=2e-4",
        "optim.warmup_ratio=0",
        *more,
    ]


def run_layout(
    world_size: int,
    runs: Sequence[tuple[str, Sequence[str]]],
    *,
    config: Path = ROOT / "configs" / "base.yaml",
    timeout_s: float = 600.0,
    more_ends: bool = False,
) -> None:
    """Carries out training runs, (run.dir, overrides) each, one after the other on ``world_size`` forked ranks.

    ``more_ends``: every fifth token ends a response, so rows end early, at once, and by a correction.
    """
    preload()

    run_ranks(train_all, world_size, runs, config, more_ends, timeout_s=timeout_s)


def join_deepspeed(rank: int) -> None:
    """Makes a rank of ``run_ranks`` one of a launcher's, as DeepSpeed wants it."""
    import deepspeed

    from megadistill.launch.deepspeed_patches import disable_shm_op, skip_muon_compilation

    world_size = str(torch.distributed.get_world_size())
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"WORLD_SIZE": world_size, "LOCAL_SIZE": world_size}
    disable_shm_op()
    skip_muon_compilation()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


def train_all(rank: int, runs: Sequence[tuple[str, Sequence[str]]], config: Path, more_ends: bool = False) -> None:
    """What each rank of ``run_layout`` does."""
    from deepspeed.utils import groups

    join_deepspeed(rank)
    ends = [f"model.eos_tokens={list(range(0, VOCABULARY, 5))}"] if more_ends else []
    for run_dir, overrides in runs:
        _train(config, run_dir, [*overrides, *ends])
        # DeepSpeed keeps the tensor-parallel groups of the first engine for good; the next run may have another layout.
        for name in ("_TENSOR_MODEL_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP", "_MODEL_PARALLEL_GROUP", "mpu"):
            setattr(groups, name, None)


def _train(file: Path, run_dir: str, overrides: list[str]) -> None:
    from megadistill.config.load import load_config
    from megadistill.parallel.context import ParallelContext
    from megadistill.training.data import load_training_data
    from megadistill.training.length import RunLength
    from megadistill.training.loop import train
    from megadistill.training.resume import plan_start
    from megadistill.training.setup import build_components, check_models, run_tokenizer

    config = load_config(file, [f"run.dir={run_dir}", *overrides])
    start = plan_start(config)
    world_size = torch.distributed.get_world_size()
    tp_size = check_models(config, world_size)
    tokenizer, vocab_size = run_tokenizer(config)
    data = load_training_data(config, tokenizer, vocab_size)
    context = ParallelContext.build(tp_size, 120, torch.device("cpu"))
    length = RunLength.of(config, data)
    components = build_components(config, context, tokenizer, vocab_size, data, length)
    train(components, data, start)
    torch.distributed.barrier()


def free_port() -> str:
    """A free port of the loopback address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def losses(run_dir: Path, key: str = "loss") -> list[float]:
    return [json.loads(line)[key] for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def samples(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run_dir / "checkpoints" / f"step_{step}" / "hf" / "model.safetensors")
