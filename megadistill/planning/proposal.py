"""A configuration for two given models and some machines: the fastest layout that fits, with the reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megadistill.config.schema import RunConfig
from megadistill.errors import ConfigError
from megadistill.models.loading import load_model_config
from megadistill.planning.case import Case, Models, changed
from megadistill.planning.gpus import Gpu
from megadistill.planning.search import Candidate, changes, nearest, step_bytes, sweep

# Examples of a step where the machines can share them; the shipped pairs have as many.
_GLOBAL_BATCH = 64
_MOST_TOKENS = 512


@dataclass(frozen=True)
class Proposal:
    """What was chosen.

    Attributes:
        config: The configuration with the settings.
        settings: Key -> value of what was decided for these models and machines.
        reasons: Key -> why.
        layout: The layout.
        num_layouts: How many fit.
        gpu: The GPU.
    """

    config: RunConfig
    settings: Mapping[str, Any]
    reasons: Mapping[str, str]
    layout: Candidate
    num_layouts: int
    gpu: Gpu

    def describe(self) -> str:
        """The layout and what it needs, in one line."""
        case = self.layout.case
        memory = f"{step_bytes(case, self.layout.use) / 1e9:.1f} of {case.gpu_memory / 1e9:.0f} GB a process"
        return (
            f"tp {case.tp_size} x dp {case.dp_size}, ZeRO-{case.zero_stage}: the fastest of {self.num_layouts} layouts "
            f"that fit ({self.layout.seconds:.3g} s a step, {memory}, predicted)"
        )


def propose(
    config: RunConfig, *, nodes: int, gpus_per_node: int, gpu_memory: int, gpu: Gpu, like_gpu: bool
) -> Proposal:
    """Chooses lengths, batch, and layout.

    Args:
        config: Models that can be described (``known.with_configurations``) and everything that is not chosen here.
        nodes: Machines.
        gpus_per_node: GPUs of a machine, each with one process.
        gpu_memory: Bytes of a GPU.
        gpu: The GPU.
        like_gpu: Plan what the code chooses on a GPU.

    Raises:
        ConfigError: Nothing fits; the line has what would.
    """
    settings, reasons = _lengths(config)
    world_size = nodes * gpus_per_node
    settings["train.global_batch_size"] = -(-_GLOBAL_BATCH // world_size) * world_size
    reasons["train.global_batch_size"] = f"a multiple of {world_size} processes"
    case = Case.of(
        changed(config, settings), Models.of(changed(config, settings)), nodes=nodes, gpus_per_node=gpus_per_node,
        gpu_memory=gpu_memory, like_gpu=like_gpu, is_checked=False,
    )  # fmt: skip
    layouts = sweep(case, gpu)
    if not layouts:
        raise ConfigError(_nothing_fits(case, gpu))
    best = layouts[0]
    settings |= best.settings()
    reasons |= _reasons(best, layouts)
    return Proposal(changed(config, settings), settings, reasons, best, len(layouts), gpu)


def _lengths(config: RunConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Limits in tokens that both models can read."""
    paths = {"model.teacher.path": config.model.teacher.path, "model.student.path": config.model.student.path}
    shapes = [load_model_config(path, key) for key, path in paths.items() if path is not None]
    positions = [getattr(shape, "max_position_embeddings", None) for shape in shapes]
    longest = min([_MOST_TOKENS, *(count for count in positions if count is not None)])
    new = max(1, longest // 2)
    why = "as long as both models can read" if longest < _MOST_TOKENS else "as in the paper; look at your rows' lengths"
    settings = {
        "data.max_prompt_tokens": longest - new,
        "data.max_tokens": longest,
        "generation.max_new_tokens": new,
        "eval.max_new_tokens": new,
    }
    return settings, {"data.max_tokens": why}


def _reasons(best: Candidate, layouts: Sequence[Candidate]) -> dict[str, str]:
    case = best.case

    def others(name: str, values: Mapping[Any, Candidate]) -> str:
        rest = {value: found for value, found in values.items() if value != best.settings()[name]}
        if not rest:
            return "no other value fits"
        return "; ".join(f"{value}: {found.seconds:.3g} s a step" for value, found in sorted(rest.items()))

    reasons = {}
    for name in best.settings():
        fastest: dict[Any, Candidate] = {}
        for found in layouts:  # fastest first
            fastest.setdefault(found.settings()[name], found)
        reasons[name] = others(name, fastest)
    heads = ", ".join(str(count) for count in sorted(set(case.models.head_counts().values())))
    reasons["parallel.tp_size"] = f"must divide {heads} heads; {reasons['parallel.tp_size']}"
    reasons["generation.max_cache_bytes"] = "keys and values of the text that is written at a time"
    return reasons


def _nothing_fits(case: Case, gpu: Gpu) -> str:
    machines = f"{case.nodes} x {case.gpus_per_node} processes with {case.gpu_memory / 1e9:.0f} GB each"
    found = nearest(case, gpu)
    if found is None:
        return f"no layout of these models fits {machines}, nor up to eight times as many machines"
    what = ", ".join(f"{key} {value}" if key.startswith("--") else f"{key}={value}" for key, value in
                     changes(case, found.case).items())  # fmt: skip
    return f"no layout of these models fits {machines}; this would: {what}"
