"""Checkpoints to resume from: written beside, renamed into place, and named by ``latest`` only when whole.

A checkpoint folder ``step_N`` holds DeepSpeed's shards (student weights, optimizer), ``trainer.pt`` (gate and its
optimizer), ``hf/`` (the student as a Hugging Face folder) and ``manifest.json``. Data order, schedule and random
numbers are functions of the step and need no state.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch

from megadistill.checkpoint.hf_export import HF_FOLDER, export_student
from megadistill.checkpoint.manifest import (
    LATEST,
    MANIFEST,
    check_files,
    digest,
    files_below,
    read_manifest,
    write_atomically,
    write_manifest,
)
from megadistill.engines.student import Student
from megadistill.errors import CheckpointError
from megadistill.parallel.context import ParallelContext

_TRAINER = "trainer.pt"
_GRID = ("tp_size", "dp_size", "zero_stage")


def layout_of(student: Student, trainer_state: dict[str, Any], context: ParallelContext) -> dict[str, Any]:
    """What a checkpoint can be loaded by: the same grid and ZeRO stage, the same parameters, the same gate.

    ``model`` is the fingerprint of the whole model, the same on every rank; ``gate`` is the gate's size.
    """
    gate = trainer_state.get("gate", {}).get("gate", {})
    return {
        "tp_size": context.tp_size,
        "dp_size": context.dp_size,
        "zero_stage": student.engine.zero_optimization_stage(),
        "model": student.loaded.fingerprint,
        "gate": sum(tensor.numel() for tensor in gate.values()),
    }


def save_checkpoint(
    folder: Path,
    step: int,
    student: Student,
    trainer_state: dict[str, Any],
    tokenizer: Any,
    context: ParallelContext,
    *,
    keep_last: int,
    keep_every: int = 0,
) -> Path:
    """Writes ``folder/step_N`` after ``step`` updates (collective over the world); removes what is not to be kept."""
    beside, target = folder / f"step_{step}.partial", folder / f"step_{step}"
    if context.is_main:
        for stale in folder.glob("step_*.partial"):
            shutil.rmtree(stale)
        beside.mkdir(parents=True)
    context.barrier()
    student.engine.save_checkpoint(str(folder), tag=beside.name, save_latest=False)
    export_student(student, beside / HF_FOLDER, tokenizer, context)
    if context.is_main:
        torch.save(trainer_state, beside / _TRAINER)
    context.barrier()
    files = _share(files_below(beside), context)
    digests = context.gather_objects({name: digest(beside / name) for name in files})
    if context.is_main:
        merged = {name: entry for part in digests for name, entry in part.items()}
        layout = layout_of(student, trainer_state, context)
        write_manifest(beside, step, layout, dict(sorted(merged.items())))
        shutil.rmtree(target, ignore_errors=True)
        beside.replace(target)
        write_atomically(folder / LATEST, target.name + "\n")
        _remove_old(folder, step, keep_last, keep_every)
    context.barrier()
    return target


def load_checkpoint(
    folder: Path, student: Student, trainer_state: dict[str, Any], context: ParallelContext
) -> tuple[int, dict[str, Any]]:
    """Restores the student; returns (number of updates done, trainer state). Collective over the world.

    ``trainer_state`` is that of the run as it is now: what is loaded must fit it. Raises CheckpointError, on all
    ranks, for a broken checkpoint or one of another layout, model or gate.
    """
    error: CheckpointError | None = None
    manifest: dict[str, Any] = {}
    try:
        manifest = read_manifest(folder)
        _check_layout(folder, manifest["layout"], layout_of(student, trainer_state, context))
        check_files(folder, manifest, _share(sorted(manifest["files"]), context))
    except CheckpointError as found:
        error = found
    context.raise_together(error)
    loaded, _ = student.engine.load_checkpoint(str(folder.parent), tag=folder.name)
    assert loaded is not None, f"DeepSpeed found nothing in {folder}, though its manifest is whole"
    saved_state = torch.load(folder / _TRAINER, map_location=context.device, weights_only=True)
    return int(manifest["step"]), saved_state


def _check_layout(folder: Path, saved: dict[str, Any], here: dict[str, Any]) -> None:
    # The grid first: another one changes the shapes of the shards, too.
    for keys, advice in (
        (_GRID, "resume at the saved layout, or start a new run from its hf/ folder"),
        (("model",), "it belongs to another model"),
        (("gate",), "loss.clip and loss.top_k must be those of the run that saved it"),
    ):
        theirs, ours = ({key: layout.get(key) for key in keys} for layout in (saved, here))
        if theirs != ours:
            raise CheckpointError(f"{folder} was saved at {_words(theirs)}; this run has {_words(ours)}: {advice}")


def _words(layout: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in layout.items())


def _share(names: list[str], context: ParallelContext) -> list[str]:
    """This rank's part of a list of files: checksums are computed by all ranks together."""
    return names[context.rank :: context.world_size]


def _remove_old(folder: Path, step: int, keep_last: int, keep_every: int) -> None:
    """Keeps the last checkpoints up to ``step`` and those of every ``keep_every`` steps.

    Later ones are of a branch that was left by an earlier resume, and a folder with any other name is the user's: both
    stay.
    """
    found = ((re.fullmatch(r"step_(\d+)", path.name), path) for path in folder.iterdir() if (path / MANIFEST).is_file())
    steps = sorted((int(match[1]), path) for match, path in found if match and int(match[1]) <= step)
    for number, old in steps[:-keep_last]:
        if not keep_every or number % keep_every:
            shutil.rmtree(old)
