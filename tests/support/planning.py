"""Dry runs and measured steps of tiny models, in forks of a parent that has DeepSpeed loaded."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megadistill.config.schema import RunConfig
from megadistill.planning.use import StepUse
from tests.support.preload import preload
from tests.support.runs import join_deepspeed
from tests.support.spawn import run_ranks

# Head counts that 2, 3 and 4 divide; a vocabulary that none of them does.
HEADS, VOCABULARY = 12, 1009
COMMON = {"num_attention_heads": HEADS, "max_position_embeddings": 128, "vocab_size": VOCABULARY}
LLAMA_LIKE = {**COMMON, "num_key_value_heads": HEADS, "num_hidden_layers": 2, "head_dim": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **LLAMA_LIKE, "tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3", **LLAMA_LIKE, "tie_word_embeddings": True},
    "opt": {"model_type": "opt", **COMMON, "num_hidden_layers": 2},
    "gpt2": {"model_type": "gpt2", "n_head": HEADS, "n_layer": 2, "n_positions": 128, "vocab_size": VOCABULARY},
}
PROMPT, RESPONSE = 12, 8


@dataclass(frozen=True)
class Layout:
    """How a tiny pair is run.

    Attributes:
        world_size: Processes.
        tp_size: Tensor-parallel size.
        zero_stage: ZeRO stage.
        dtype: Type of both models.
        family: A key of ``FAMILIES``.
        checkpoints: Gradient checkpointing.
        more: Further settings, section -> values.
        lora: Rank of the student's adapters.
    """

    world_size: int
    tp_size: int
    zero_stage: int
    dtype: str = "fp32"
    family: str = "llama"
    checkpoints: bool = False
    more: tuple[tuple[str, Any], ...] = ()
    lora: int = 0

    def __str__(self) -> str:
        dp_size = self.world_size // self.tp_size
        return (
            f"tp{self.tp_size}xdp{dp_size} zero{self.zero_stage} {self.dtype} {self.family}"
            + (" checkpoints" if self.checkpoints else "")
            + (f" lora {self.lora}" if self.lora else "")
        )


def write_models(folder: Path) -> None:
    """Configuration files of a teacher and a student of every family."""
    for family, common in FAMILIES.items():
        for role, width in (("teacher", 192), ("student", 96)):
            sizes = {"hidden_size": width, "intermediate_size": 2 * width}
            if family == "opt":
                sizes = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 2 * width}
            if family == "gpt2":
                sizes = {"n_embd": width}
            file = folder / family / f"{role}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({**common, **sizes}), encoding="utf-8")


def settings(models: Path, layout: Layout) -> RunConfig:
    """The run of a layout."""
    roles: dict[str, dict[str, Any]] = {
        role: {"path": str(models / layout.family / f"{role}.json"), "dtype": layout.dtype}
        for role in ("teacher", "student")
    }
    roles["student"]["lora"] = {"r": layout.lora}
    tree: dict[str, dict[str, Any]] = {
        "run": {"dir": "unused"},
        "model": {**roles, "gradient_checkpointing": layout.checkpoints},
        "parallel": {"tp_size": layout.tp_size, "zero_stage": layout.zero_stage},
        "data": {"train_path": "unused", "max_prompt_tokens": PROMPT, "max_tokens": PROMPT + RESPONSE},
        "generation": {"max_new_tokens": RESPONSE},
        "train": {"global_batch_size": 4 * layout.world_size // layout.tp_size, "micro_batch_size": 2},
    }
    for section, values in layout.more:
        tree[section] = tree.get(section, {}) | values
    return RunConfig.model_validate(tree)


def forked(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What a function returns in a fork of this process, which it may leave in any state."""
    preload()

    torch.set_num_threads(1)  # a thread pool of the parent does not survive the fork
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *arguments, **named).result()


def ghost(models: Path, layout: Layout, rank: int = 0, **named: Any) -> StepUse:
    """The dry run of a rank."""
    given = {"like_gpu": False, "gpu_memory": 0, "prompt_tokens": PROMPT, "response_tokens": RESPONSE} | named
    found: StepUse = forked(_dry_run, settings(models, layout), rank=rank, world_size=layout.world_size, **given)
    return found


def ghosts(models: Path, asked: Sequence[tuple[Layout, int]]) -> list[StepUse]:
    """The dry runs of ranks of layouts, one after the other in one fork."""
    runs = [(settings(models, layout), rank, layout.world_size) for layout, rank in asked]
    found: list[StepUse] = forked(_dry_runs, runs)
    return found


def _dry_runs(runs: Sequence[tuple[RunConfig, int, int]]) -> list[StepUse]:
    from deepspeed.utils import groups

    found = []
    for config, rank, world_size in runs:
        found.append(
            _dry_run(
                config, rank=rank, world_size=world_size, like_gpu=False, gpu_memory=0, prompt_tokens=PROMPT,
                response_tokens=RESPONSE,
            )
        )  # fmt: skip
        _forget_groups(groups)
    return found


def _forget_groups(groups: Any) -> None:
    """DeepSpeed keeps the tensor-parallel groups of the first engine for good; the next layout has others."""
    for name in ("_TENSOR_MODEL_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP", "_MODEL_PARALLEL_GROUP", "mpu"):
        setattr(groups, name, None)


def _dry_run(config: RunConfig, **named: Any) -> StepUse:
    from megadistill.planning.dry_run import dry_run

    return dry_run(config, **named)


def measure(models: Path, layouts: Sequence[Layout]) -> list[list[StepUse]]:
    """The measured steps of layouts of one world size: for each layout those of all ranks."""
    preload()

    ranks = run_ranks(_measured, layouts[0].world_size, models, layouts, timeout_s=1500.0)
    return [list(of_layout) for of_layout in zip(*ranks, strict=True)]


def _measured(rank: int, models: Path, layouts: Sequence[Layout]) -> list[StepUse]:
    from deepspeed.utils import groups

    from megadistill.parallel.context import ParallelContext
    from megadistill.planning.counted_step import Lengths, measured_step, plannable, vocabulary

    join_deepspeed(rank)
    found = []
    for layout in layouts:
        config, _ = plannable(settings(models, layout))
        context = ParallelContext.build(layout.tp_size, 120, torch.device("cpu"))
        found.append(measured_step(config, context, Lengths(PROMPT, RESPONSE), vocab_size=vocabulary(config)))
        _forget_groups(groups)
    return found
