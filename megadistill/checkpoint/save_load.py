"""Checkpoints to resume from: written beside, renamed into place, and named by ``latest`` only when whole.

A checkpoint folder ``step_N`` holds DeepSpeed's shards (student weights, optimizer), ``trainer.pt`` (gate and its
optimizer), ``hf/`` (the student as a Hugging Face folder) and ``manifest.json``. Data order, schedule and random
numbers are functions of the step and need no state.
"""

from __future__ import annotations

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


def layout_of(student: Student, context: ParallelContext) -> dict[str, int]:
    """What a checkpoint can be loaded by: the same grid and ZeRO stage."""
    return {
        "tp_size": context.tp_size,
        "dp_size": context.dp_size,
        "zero_stage": student.engine.zero_optimization_stage(),
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
) -> Path:
    """Writes ``folder/step_N`` after ``step`` updates (collective over the world) and removes all but the last ones."""
    beside, target = folder / f"step_{step}.partial", folder / f"step_{step}"
    if context.is_main:
        shutil.rmtree(beside, ignore_errors=True)
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
        write_manifest(beside, step, layout_of(student, context), dict(sorted(merged.items())))
        shutil.rmtree(target, ignore_errors=True)
        beside.replace(target)
        write_atomically(folder / LATEST, target.name + "\n")
        _remove_old(folder, keep_last)
    context.barrier()
    return target


def load_checkpoint(folder: Path, student: Student, context: ParallelContext) -> tuple[int, dict[str, Any]]:
    """Restores the student; returns (number of updates done, trainer state). Collective over the world.

    Raises CheckpointError, on all ranks, for a broken checkpoint or one of another layout.
    """
    error: CheckpointError | None = None
    manifest: dict[str, Any] = {}
    try:
        manifest = read_manifest(folder)
        layout = layout_of(student, context)
        if manifest["layout"] != layout:
            raise CheckpointError(
                f"{folder} was saved at {_words(manifest['layout'])}; this run has {_words(layout)}. "
                "Resume at the saved layout, or start a new run from its hf/ folder"
            )
        check_files(folder, manifest, _share(sorted(manifest["files"]), context))
    except CheckpointError as found:
        error = found
    context.raise_together(error)
    loaded, _ = student.engine.load_checkpoint(str(folder.parent), tag=folder.name)
    assert loaded is not None, f"DeepSpeed found nothing in {folder}, though its manifest is whole"
    trainer_state = torch.load(folder / _TRAINER, map_location=context.device, weights_only=True)
    return int(manifest["step"]), trainer_state


def _words(layout: dict[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in layout.items())


def _share(names: list[str], context: ParallelContext) -> list[str]:
    """This rank's part of a list of files: checksums are computed by all ranks together."""
    return names[context.rank :: context.world_size]


def _remove_old(folder: Path, keep_last: int) -> None:
    whole = [p for p in folder.glob("step_*") if p.suffix != ".partial" and (p / MANIFEST).is_file()]
    for old in sorted(whole, key=lambda p: int(p.name.removeprefix("step_")))[:-keep_last]:
        shutil.rmtree(old)
