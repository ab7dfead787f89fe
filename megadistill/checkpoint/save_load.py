"""Resuming from a checkpoint, at any layout.

A checkpoint folder ``step_N`` has ``student/`` (weights and optimizer by parameter, models/shards.py), ``trainer.pt``
(gate and its optimizer, replay buffer), ``hf/`` (the student as a Hugging Face folder) and ``manifest.json``. Data
order, schedule and random numbers are functions of the step and need no state.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megadistill.checkpoint.manifest import (
    STUDENT_FOLDER,
    OtherVersionError,
    check_files,
    read_manifest,
)
from megadistill.checkpoint.writer import TRAINER, layout_of
from megadistill.engines.student import Student
from megadistill.errors import CheckpointError, first_line
from megadistill.files import os_errors_as
from megadistill.models.shards import MASTER, ShardReader
from megadistill.observability.log import get_logger
from megadistill.parallel.context import ParallelContext


def load_checkpoint(
    candidates: Sequence[Path],
    student: Student,
    trainer_state: dict[str, Any],
    context: ParallelContext,
    *,
    max_steps: int,
) -> tuple[Path, int, dict[str, Any]]:
    """Restores the student from the first complete checkpoint of ``candidates``. Collective over the world.

    A rank reads its own part of the files where the layout is that of the checkpoint, else all of them. A damaged
    candidate is renamed to ``step_N.damaged`` unless it is the last one.

    Args:
        candidates: Checkpoints, the best first.
        student: The model to fill.
        trainer_state: State of the run as it is now, which the loaded one must fit.
        context: Ranks and groups.
        max_steps: The run's last step.

    Returns:
        The checkpoint, its number of updates, and its trainer state.

    Raises:
        CheckpointError: On all ranks: none is complete, or it belongs to another model or gate.
    """
    for folder in candidates:
        manifest, damage = find_damage(folder, context)
        if damage is None:
            break
        if folder == candidates[-1]:
            raise CheckpointError(damage)
        log = get_logger(context.rank, "checkpoint")
        log.warning(f"{damage}; renamed to {folder.name}.damaged, and the checkpoint before it is used")
        context.run_on_rank0(partial(_quarantine, folder))
    _check_fit(folder, manifest["layout"], layout_of(student, trainer_state, context))
    if manifest["step"] > max_steps:
        raise CheckpointError(
            f"{folder} is at step {manifest['step']}, after the run's last step {max_steps}",
            setting="train.max_steps, train.epochs",
        )
    student.fill(ShardReader(folder / STUDENT_FOLDER), MASTER)
    saved_state = read_trainer_state(folder, context.device)
    context.barrier()
    return folder, int(manifest["step"]), saved_state


def read_trainer_state(folder: Path, device: torch.device | str) -> dict[str, Any]:
    """What a checkpoint holds besides the student, on ``device``.

    Raises:
        CheckpointError: It would have to be executed, or is not there.
    """
    try:
        state: dict[str, Any] = torch.load(folder / TRAINER, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, FileNotFoundError) as error:
        raise CheckpointError(f"{folder / TRAINER} cannot be read as plain tensors: {first_line(error)}") from None
    return state


def find_damage(folder: Path, context: ParallelContext) -> tuple[dict[str, Any], str | None]:
    """The manifest, and what is wrong with the files: the same on all ranks, which share the work (two gathers)."""
    manifest: dict[str, Any] = {}
    damage: str | None = None
    foreign: CheckpointError | None = None
    try:
        manifest = read_manifest(folder)
        check_files(folder, manifest, sorted(manifest["files"])[context.rank :: context.world_size])
    except OtherVersionError as error:  # not damaged, for the program that wrote it
        foreign = error
    except CheckpointError as error:
        damage = str(error)
    context.raise_on_all_ranks(foreign)
    damages = [message for message in context.gather_objects(damage) if message is not None]
    return manifest, damages[0] if damages else None


def _quarantine(folder: Path) -> None:
    if not folder.exists():
        return
    number = 0
    while (aside := folder.with_name(f"{folder.name}.damaged{number or ''}")).exists():
        number += 1
    with os_errors_as(CheckpointError, folder, "is damaged and cannot be renamed"):
        folder.rename(aside)


def _check_fit(folder: Path, saved: dict[str, Any], here: dict[str, Any]) -> None:
    for key, advice, setting in (
        ("model", "it belongs to another model, or to other adapters", "model.student.path, model.student.lora"),
        ("gate", "the gate must be that of the run that saved it", "loss.clip, loss.top_k"),
    ):
        if saved.get(key) != here[key]:
            message = f"{folder} was saved with {key}={saved.get(key)}; this run has {here[key]}: {advice}"
            raise CheckpointError(message, setting=setting)
