"""Going on from a checkpoint, at any layout: which one is whole, and how it becomes the student again.

A checkpoint folder ``step_N`` holds ``student/`` (weights and optimizer by parameter, models/shards.py), ``trainer.pt``
(gate and its optimizer, replay buffer), ``hf/`` (the student as a Hugging Face folder) and ``manifest.json``. Data
order, schedule and random numbers are functions of the step and need no state.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megadistill.checkpoint.manifest import (
    LATEST,
    STUDENT_FOLDER,
    OtherVersionError,
    check_files,
    read_manifest,
    write_atomically,
)
from megadistill.checkpoint.writer import TRAINER, layout_of
from megadistill.engines.student import Student
from megadistill.errors import CheckpointError, first_line
from megadistill.models.shards import MASTER, ShardReader
from megadistill.observability.log import get_logger
from megadistill.parallel.context import ParallelContext


def load_checkpoint(
    candidates: Sequence[Path],
    own: Path,
    student: Student,
    trainer_state: dict[str, Any],
    context: ParallelContext,
    *,
    max_steps: int,
) -> tuple[Path, int, dict[str, Any]]:
    """Restores the student from the first whole one of ``candidates``; returns (it, number of updates done, trainer
    state).

    Collective over the world; reads its own part of the files where the layout is that of the checkpoint, all of them
    otherwise. ``trainer_state`` is that of the run as it is now: what is loaded must fit it. ``own`` is the run's
    folder of checkpoints, in which ``latest`` names what was loaded from now on. A damaged candidate with another
    behind it is renamed to ``step_N.damaged``. Raises CheckpointError, on all ranks, when none is whole or it belongs
    to another model or gate.
    """
    for folder in candidates:
        manifest, damage = _examine(folder, context)
        if damage is None:
            break
        if folder == candidates[-1]:
            raise CheckpointError(damage)
        get_logger(context.rank).warning(f"{damage}; the checkpoint before it is used, this one is kept as .damaged")
        context.run_on_rank0(lambda folder=folder: _put_aside(folder))
    _check_fit(folder, manifest["layout"], layout_of(student, trainer_state, context))
    if manifest["step"] > max_steps:
        raise CheckpointError(f"{folder} is at step {manifest['step']}, past train.max_steps={max_steps}")
    student.fill(ShardReader(folder / STUDENT_FOLDER), MASTER)
    try:
        saved_state = torch.load(folder / TRAINER, map_location=context.device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{folder / TRAINER} cannot be read as plain tensors: {first_line(error)}") from None
    context.barrier()
    if folder.parent.resolve() == own.resolve():  # going back is for good: metrics.jsonl goes back as well
        context.run_on_rank0(lambda: write_atomically(folder.parent / LATEST, folder.name + "\n"))
    return folder, int(manifest["step"]), saved_state


def _examine(folder: Path, context: ParallelContext) -> tuple[dict[str, Any], str | None]:
    """The manifest, and what is wrong with the files (the same on all ranks, which share the work)."""
    manifest: dict[str, Any] = {}
    damage: str | None = None
    foreign: CheckpointError | None = None
    try:
        manifest = read_manifest(folder)
        check_files(folder, manifest, sorted(manifest["files"])[context.rank :: context.world_size])
    except OtherVersionError as error:  # nothing is wrong with it, for the program that wrote it
        foreign = error
    except CheckpointError as error:
        damage = str(error)
    context.raise_on_all_ranks(foreign)
    found = [error for error in context.gather_objects(damage) if error is not None]
    return manifest, found[0] if found else None


def _put_aside(folder: Path) -> None:
    if not folder.exists():
        return
    number = 0
    while (aside := folder.with_name(f"{folder.name}.damaged{number or ''}")).exists():
        number += 1
    try:
        folder.rename(aside)
    except OSError as error:
        raise CheckpointError(f"{folder} is damaged and cannot be renamed: {error.strerror}") from error


def _check_fit(folder: Path, saved: dict[str, Any], here: dict[str, Any]) -> None:
    for key, advice in (
        ("model", "it belongs to another model"),
        ("gate", "loss.clip and loss.top_k must be those of the run that saved it"),
    ):
        if saved.get(key) != here[key]:
            raise CheckpointError(f"{folder} was saved with {key}={saved.get(key)}; this run has {here[key]}: {advice}")
