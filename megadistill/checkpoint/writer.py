"""Asynchronous checkpoints: copied at once, written by a thread, committed when every rank has written.

A checkpoint of step N is made in three phases:

1. *begin*: every rank copies its part to host memory, and what it is to write of ``hf/``. Training continues.
2. A thread of every rank writes both into ``step_N.partial`` and takes their checksums on the way.
3. When all have (the ranks learn this from the all-reduce that every step makes), rank 0's thread completes ``hf/``,
   writes the manifest, renames the folder, and points ``latest`` to it.

So ``latest`` always names a complete checkpoint, and a crash at any moment leaves the one before. So does ``best``,
which names the checkpoint of the best validation where the run asks for it; that one is not removed.
"""

from __future__ import annotations

import io
import re
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megadistill.checkpoint.adapter_export import prove_adapters
from megadistill.checkpoint.carried import Carried
from megadistill.checkpoint.hf_export import complete_student, prove_student
from megadistill.checkpoint.manifest import (
    HF_FOLDER,
    MANIFEST,
    STUDENT_FOLDER,
    digest,
    files_below,
    point_to_best,
    point_to_latest,
    write_manifest,
)
from megadistill.checkpoint.whole_weights import Share, WholeWeights
from megadistill.engines.student import Student
from megadistill.errors import CheckpointError, MegadistillError
from megadistill.files import os_errors_as, reason_of, sync_folder, write_digested
from megadistill.models.lora import trained_names
from megadistill.models.shards import ShardReader, shard_file, write_layout, write_shard
from megadistill.observability.log import get_logger
from megadistill.parallel.context import ParallelContext

TRAINER = "trainer.pt"
IDLE, BUSY, FAILED = 0, 1, 2


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay.

    Attributes:
        last: So many.
        every: Also those of every so many steps; 0: none.
        weights_only: Of the latter, ``hf/`` alone, as ``weights_N``.
    """

    last: int
    every: int = 0
    weights_only: bool = False


def layout_of(student: Student, trainer_state: dict[str, Any], context: ParallelContext) -> dict[str, Any]:
    """The layout of a checkpoint, for its manifest.

    Returns:
        The process grid that saves it, and what a run that loads it must have: ``model``, the fingerprint of the whole
        model (the same on every rank), and ``gate``, the number of the gate's parameters.
    """
    gate = trainer_state.get("gate", {}).get("gate", {})
    return {
        "tp_size": context.tp_size,
        "dp_size": context.dp_size,
        "zero_stage": student.engine.zero_optimization_stage(),
        "model": student.loaded.fingerprint,
        "gate": sum(tensor.numel() for tensor in gate.values()),
    }


class CheckpointWriter:
    """Writes ``folder/step_N``, one at a time. All methods except ``status`` are collective over the world.

    Args:
        folder: The run's folder of checkpoints.
        student: The student.
        carried: What the checkpoint's ``hf/`` has beside its weights; only rank 0 needs it.
        context: Ranks and groups.
        keep: Which checkpoints stay.
        asynchronous: Where False, ``begin`` returns when the checkpoint is complete.
    """

    def __init__(
        self,
        folder: Path,
        student: Student,
        carried: Carried | None,
        context: ParallelContext,
        *,
        keep: Keep,
        asynchronous: bool = True,
    ) -> None:
        self._folder, self._student, self._carried, self._context = folder, student, carried, context
        self._weights = WholeWeights(student, context)
        self._keep, self._asynchronous = keep, asynchronous
        self._job: _Job | None = None
        self._is_committing = False
        self._is_first, self._is_proved = True, False
        self._step = 0
        self._best_step: int | None = None
        self._layout: dict[str, Any] = {}

    @property
    def status(self) -> int:
        """State of this rank's thread: IDLE, BUSY or FAILED."""
        return IDLE if self._job is None else self._job.status

    def begin(
        self, step: int, trainer_state: dict[str, Any], best_step: int | None = None, *, is_hurried: bool = False
    ) -> None:
        """Copies everything after ``step`` updates and starts to write it; waits for the previous checkpoint.

        It also waits for the first one of this process, whose ``hf/`` is compared with the student on a probe text:
        loading a model changes torch's default type, which no training step may see.

        Args:
            step: Number of updates.
            trainer_state: What a resumed run needs besides the student.
            best_step: The checkpoint to keep as the best one: this one or an earlier one; None: none.
            is_hurried: The process may be killed soon: nothing is compared.
        """
        self.finish()
        self._is_proved = self._is_first and not is_hurried
        context, beside = self._context, self._folder / f"step_{step}.partial"
        context.run_on_rank0(lambda: self._make_folder(beside))
        self._step, self._best_step = step, best_step
        self._layout = layout_of(self._student, trainer_state, context)
        runs, steps = self._student.snapshot(), self._student.optimizer_steps
        share = self._weights.collect(runs)
        state = io.BytesIO()
        if context.is_rank0:
            torch.save(trainer_state, state)  # now: the next step changes the tensors in it
        self._job = _Job(lambda: self._write(beside, runs, share, steps, state.getvalue()))
        if not self._asynchronous or self._is_first:
            self.finish()
        self._is_first = False

    def advance(self, worst: int) -> None:
        """Starts the next phase when all ranks are ready: one gather of objects, where none is busy.

        Args:
            worst: The greatest status of all ranks.

        Raises:
            CheckpointError: On every rank: one of them could not write.
        """
        if self._job is None or worst == BUSY:
            return
        self._job.thread.join()
        beside = self._folder / f"step_{self._step}.partial"
        results = self._context.gather_objects((self._job.result, self._job.error))
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(results) if error is not None]
        if errors:
            self._job = None
            if self._context.is_rank0:
                shutil.rmtree(beside, ignore_errors=True)
            raise CheckpointError(f"the checkpoint of step {self._step} could not be written: {errors[0]}")
        if self._is_committing:
            self._job, self._is_committing = None, False
            return
        self._is_committing = True
        digests = {name: entry for entries, _ in results for name, entry in entries.items()}
        is_rank0 = self._context.is_rank0
        self._job = _Job(lambda: self._commit(beside, digests) if is_rank0 else None)

    def finish(self) -> None:
        """Waits until a checkpoint that was begun is complete. Raises CheckpointError as ``advance``."""
        while self._job is not None:
            self._job.thread.join()
            status = torch.tensor(float(self.status), device=self._context.device)
            self.advance(int(self._context.max_over_world(status)))

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Completes a checkpoint that was begun, after errors that all ranks raise together."""
        if isinstance(error, MegadistillError):
            with suppress(CheckpointError):  # the other error is the one to report
                self.finish()

    def _make_folder(self, beside: Path) -> None:
        with os_errors_as(CheckpointError, beside, "cannot be created"):
            for pattern in ("step_*.partial", "step_*.replaced"):  # what a killed run left
                for stale in self._folder.glob(pattern):
                    shutil.rmtree(stale)
            for folder in (STUDENT_FOLDER, HF_FOLDER):
                (beside / folder).mkdir(parents=True)

    def _write(
        self, beside: Path, runs: dict[str, tuple[int, torch.Tensor]], share: Share, steps: int, trainer: bytes
    ) -> dict[str, dict[str, Any]]:
        """This rank's files; returns their entries of the manifest."""
        context, folder = self._context, beside / STUDENT_FOLDER
        name = shard_file(context.tp_rank, context.dp_rank)
        entries = {f"{STUDENT_FOLDER}/{name}": write_shard(folder, name, runs)}
        entries |= {f"{HF_FOLDER}/{file}": entry for file, entry in share.write(beside / HF_FOLDER).items()}
        if context.is_rank0:
            specs = {name: self._student.shard_specs[name] for name in trained_names(self._student.loaded)}
            write_layout(folder, specs, **self._layout, optimizer_steps=steps)
            entries[TRAINER] = write_digested(beside / TRAINER, [trainer])
        return entries

    def _commit(self, beside: Path, digests: dict[str, dict[str, Any]]) -> None:
        """On rank 0, when all parts are written: what completes ``hf/``, the manifest, the folder's name."""
        student, target, hf = self._student, self._folder / f"step_{self._step}", beside / HF_FOLDER
        assert self._carried is not None  # on rank 0
        complete_student(student, {file.name: file.entries for file in self._weights.files}, hf, self._carried)
        if self._is_proved:  # training waits: see begin
            shards, loaded = ShardReader(beside / STUDENT_FOLDER), student.loaded
            if loaded.lora is None:
                prove_student(shards, loaded.config, hf, target)
            else:
                prove_adapters(shards, loaded.lora.config, hf, target)
        own = [name for name in files_below(beside) if name not in digests]
        digests |= {name: digest(beside / name, sync=True) for name in own}
        write_manifest(beside, self._step, self._layout, dict(sorted(digests.items())))
        sync_folder(beside)
        replaced = target.with_name(target.name + ".replaced")
        if target.exists():
            target.replace(replaced)
        beside.replace(target)
        sync_folder(self._folder)
        point_to_latest(target)
        point_to_best(self._folder, self._best_step)
        shutil.rmtree(replaced, ignore_errors=True)
        _remove_old(self._folder, self._step, self._keep, self._best_step)


class _Job:
    """Work of a thread, and its result or error."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: str | None = None
        self._work = work
        self.thread = threading.Thread(target=self._run, daemon=True, name="checkpoint")
        self.thread.start()

    @property
    def status(self) -> int:
        if self.thread.is_alive():
            return BUSY
        return IDLE if self.error is None else FAILED

    def _run(self) -> None:
        try:
            self.result = self._work()
        except Exception as error:  # any error ends the run, on all ranks, through advance()
            self.error = reason_of(error) if isinstance(error, OSError) else str(error) or type(error).__name__


def _remove_old(folder: Path, step: int, keep: Keep, best_step: int | None) -> None:
    """Removes checkpoints up to ``step``, except those to keep and the best one.

    Later ones belong to a branch that an earlier resume left, and folders with other names to the user: both stay.
    """
    complete = (path for path in folder.iterdir() if (path / MANIFEST).is_file())
    named = ((re.fullmatch(r"step_(\d+)", path.name), path) for path in complete)
    steps = sorted((int(match[1]), path) for match, path in named if match and int(match[1]) <= step)
    for number, old in steps[: -keep.last]:
        is_kept = keep.every > 0 and number % keep.every == 0
        if number == best_step or old.is_symlink() or (is_kept and not keep.weights_only):  # a link is the user's
            continue
        try:
            (old / MANIFEST).unlink()  # first: a folder that is half removed is not a checkpoint
            if is_kept:
                weights = folder / f"weights_{number}"
                if weights.exists():  # of a branch that an earlier resume left
                    shutil.rmtree(weights)
                (old / HF_FOLDER).replace(weights)
            shutil.rmtree(old)
        except OSError as error:
            get_logger(component="checkpoint").warning(f"old checkpoint {old} cannot be removed: {reason_of(error)}")
