"""13B into 7B as cases of the planner, on nodes of eight GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megadistill.config.load import load_config
from megadistill.planning.case import Case, Models
from megadistill.planning.gpus import GPUS

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
GB = 1e9
H100 = GPUS["H100-80"]
HPZ = "parallel.zero.hpz_partition_size"
LARGE = ["run.dir=x", "data.max_prompt_tokens=256", "data.max_tokens=512", "generation.max_new_tokens=256"]
LARGE += [f"model.teacher.path={CONFIGS / 'models' / 'meta-llama--Llama-2-13b-hf.json'}", "model.teacher.dtype=bf16"]
LARGE += [f"model.student.path={CONFIGS / 'models' / 'meta-llama--Llama-2-7b-hf.json'}", "model.student.dtype=bf16"]
LARGE += ["train.global_batch_size=64", "train.micro_batch_size=8", "model.gradient_checkpointing=true"]


def large_models() -> Models:
    """LLaMA 2 13B and 7B."""
    return Models.of(load_config(CONFIGS / "base.yaml", LARGE))


def planned(models: Models, *settings: str, nodes: int = 2, memory_gb: float = 80, **more: Any) -> Case:
    """The large pair on nodes of eight GPUs."""
    config = load_config(CONFIGS / "base.yaml", [*LARGE, *settings])
    return Case.of(config, models, nodes=nodes, gpus_per_node=8, gpu_memory=int(memory_gb * GB), **more)
