"""What a step of the demo uses, by dry runs, as recorded in tests/unit/step_use.json.

Renew the record, after looking at what has changed:  python -m tests.support.step_bar
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megadistill.planning.owners import BUCKET
from megadistill.planning.use import StepUse

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "tests" / "unit" / "step_use.json"
COMMAND = "python -m tests.support.step_bar"
# Case -> (processes, tensor-parallel size, as on a GPU, type of the models).
CASES = {
    "two CPU processes, tp 2, fp32": (2, 2, False, "fp32"),
    "one GPU, bf16": (1, 1, True, "bf16"),
}
# Share by which bytes and operations may grow before it is a fault; numbers of calls may not grow at all. Where they
# fall by more than the other share, the record is too old to notice the next growth.
MAY_GROW, MAY_FALL = 0.01, 0.15


def used() -> dict[str, dict[str, float]]:
    """Case -> figure -> number, now."""
    with tempfile.TemporaryDirectory() as folder:
        return {case: figures(_demo_step(Path(folder), *layout)) for case, layout in CASES.items()}


def figures(use: StepUse) -> dict[str, float]:
    """The numbers of a step that must not grow unnoticed."""
    found: dict[str, float] = {f"{owner} between steps, bytes": size for owner, size in use.resident.items()}
    for phase in use.phases:
        found[f"{phase.name}: peak bytes"] = phase.peak - use.resident.get(BUCKET, 0)  # it is larger than all the rest
        found[f"{phase.name}: FLOPs"] = phase.flops
        found[f"{phase.name}: operations"] = phase.operations
        for call in phase.traffic:
            found[f"{phase.name}: {call.op} calls over {call.group}"] = call.calls
            found[f"{phase.name}: {call.op} bytes over {call.group}"] = call.bytes
    written = sum(phase.operations for phase in use.phases if phase.name in ("rollout", "regenerate"))
    return found | {"operations a decoded token": round(written / use.decode_steps, 1)}


def differences(now: dict[str, dict[str, float]], recorded: dict[str, dict[str, float]]) -> Iterator[str]:
    """One line for every figure that has grown, or fallen so far that the record says nothing any more."""
    for case in sorted({*now, *recorded}):
        ours, theirs = now.get(case, {}), recorded.get(case, {})
        for name in sorted({*ours, *theirs}):
            new, old = ours.get(name, 0), theirs.get(name, 0)
            is_count = " calls " in name
            if new > old * (1 if is_count else 1 + MAY_GROW):
                yield f"{case}: {name} grew from {old:,} to {new:,}"
            elif new < old * (1 - MAY_FALL):
                yield f"{case}: {name} fell from {old:,} to {new:,}"


def _demo_step(folder: Path, world_size: int, tp_size: int, like_gpu: bool, dtype: str) -> StepUse:
    from megadistill.config.load import load_config
    from megadistill.demo.recipes import RECIPES
    from tests.support.planning import forked

    recipe, overrides = RECIPES["demo"], [f"parallel.tp_size={tp_size}"]
    for role, model in recipe.models.items():
        file = folder / f"{role}.json"
        file.write_text(json.dumps({**model.config, "vocab_size": recipe.vocab_size}), encoding="utf-8")
        overrides += [f"model.{role}.path={file}", f"model.{role}.dtype={dtype}"]
    config = load_config(ROOT / "configs" / "demo.yaml", overrides)
    found: StepUse = forked(_run, config, world_size=world_size, like_gpu=like_gpu)
    return found


def _run(config: Any, **named: Any) -> StepUse:
    from megadistill.planning.dry_run import dry_run

    response = config.generation.max_new_tokens
    return dry_run(
        config, rank=0, gpu_memory=2**36, prompt_tokens=config.data.max_prompt_tokens, response_tokens=response, **named
    )


if __name__ == "__main__":
    record = used()
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"wrote {RECORD}")
