"""Whether a run has anything left to do: found out from its checkpoint, before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megadistill.checkpoint.manifest import find_checkpoint, read_manifest
from megadistill.checkpoint.save_load import find_damage, read_trainer_state
from megadistill.config.schema import RunConfig
from megadistill.data.encode import TokenizedExample
from megadistill.errors import CheckpointError
from megadistill.parallel.context import ParallelContext
from megadistill.training.hooks.best import Best, BestValidation, best_of
from megadistill.training.length import RunLength
from megadistill.training.resume import plan_start
from megadistill.training.words import early_words


def finished(
    config: RunConfig, length: RunLength, valid: Sequence[TokenizedExample], context: ParallelContext
) -> str | None:
    """Why there is nothing left to do, in words; None where there is, or may be (collective over the world).

    A damaged checkpoint is left to the run, which goes back to the one before.
    """
    found = context.run_on_rank0(lambda: _look(config, length, valid))
    if found is None:
        return None
    folder, reason = found
    return None if find_damage(folder, context)[1] is not None else reason


def _look(config: RunConfig, length: RunLength, valid: Sequence[TokenizedExample]) -> tuple[Path, str] | None:
    start, run_dir = plan_start(config), Path(config.run.dir)
    try:
        # A checkpoint elsewhere, or one that the run is to go back to, is for the run itself to load.
        if not start.checkpoints or start.checkpoints[0] != find_checkpoint(run_dir):
            return None
        folder = start.checkpoints[0]
        step = int(read_manifest(folder)["step"])
        state: Mapping[str, Any] = read_trainer_state(folder, "cpu") if config.train.early_stopping else {}
    except CheckpointError:
        return None
    best = best_of(state)
    is_comparable = best is not None and Best(config, valid).continues(best)
    reason = reason_to_end(config, length, step, best if is_comparable else None)
    return None if reason is None else (folder, reason)


def reason_to_end(config: RunConfig, length: RunLength, step: int, best: BestValidation | None) -> str | None:
    """Why a run has nothing left to do after ``step`` steps, in words; None where it has."""
    where = f"of {config.run.dir}"
    if step == length.max_steps:
        key = "train.epochs" if config.train.epochs is not None else "train.max_steps"
        return f"nothing to do: all {step} steps {where} are done. Increase {key} to continue."
    if best is not None and best.ends(config):
        return (
            f"nothing to do: step {step} {where} was the last one, because {early_words(best)}. "
            "Increase train.early_stopping to continue."
        )
    return None
