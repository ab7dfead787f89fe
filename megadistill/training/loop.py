"""The run: steps, and a checkpoint where one is due; hooks do the rest (validation, records, profiling)."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megadistill.checkpoint.carried import Carried, carried_files, for_auto_tokenizer
from megadistill.checkpoint.hub_commits import record_commits
from megadistill.checkpoint.manifest import MANIFEST, point_to_best, point_to_latest
from megadistill.checkpoint.run_settings import RESOLVED
from megadistill.checkpoint.save_load import load_checkpoint
from megadistill.checkpoint.writer import CheckpointWriter, Keep
from megadistill.config.load import dump_resolved
from megadistill.config.schema import RunConfig
from megadistill.engines.student import Student
from megadistill.files import write_json
from megadistill.launch.heartbeat import Heartbeat
from megadistill.launch.stopping import StopRequest
from megadistill.losses.backends import choose_backend
from megadistill.observability.lock import exclusive_lock
from megadistill.observability.log import get_logger
from megadistill.parallel.context import ParallelContext
from megadistill.training.components import Components
from megadistill.training.data import TrainingData, make_sampler
from megadistill.training.finished import reason_to_end
from megadistill.training.hooks.base import Hook, HookList, StepEvent
from megadistill.training.hooks.best import Best
from megadistill.training.hooks.inputs import Inputs
from megadistill.training.hooks.nonfinite import NonFinite
from megadistill.training.hooks.profile import Profile
from megadistill.training.hooks.progress import Progress
from megadistill.training.hooks.record import Record
from megadistill.training.hooks.throughput import Throughput, num_parameters, num_trained
from megadistill.training.hooks.track import Track
from megadistill.training.hooks.validation import Validation
from megadistill.training.resume import Start, plan_start
from megadistill.training.setup import tokenizer_paths
from megadistill.training.step import distillation_step
from megadistill.training.words import data_warnings, early_words, end_lines, length_words, run_warnings


def train(
    components: Components,
    data: TrainingData,
    start: Start,
    request: StopRequest | None = None,
    heartbeat: Heartbeat | None = None,
) -> dict[str, Any]:
    """Runs from ``start`` to the last step (collective over the world).

    Args:
        components: What the run is made of.
        data: What it trains on.
        start: Where it starts; planned again once its folder is locked.
        request: Asks the run to stop: it saves after its step.
        heartbeat: Is told which step the run is in.

    Returns:
        What summary.json holds; ``{"stopped": signal name, "step": number}`` for a run that was asked to stop; an empty
        dictionary where all steps had already been done.

    Raises:
        ConfigError: On every rank, when another run writes the same folder.
    """
    with ExitStack() as held:

        def lock() -> Start:
            held.enter_context(exclusive_lock(start.run_dir / ".lock", f"run.dir={start.run_dir}"))
            return plan_start(components.config)  # again: the run that held the lock may have saved

        start = components.context.run_on_rank0(lock)
        return _train(components, data, start, request or StopRequest(), heartbeat)


def _train(
    components: Components, data: TrainingData, start: Start, request: StopRequest, heartbeat: Heartbeat | None
) -> dict[str, Any]:
    config, context = components.config, components.context
    log, max_steps = get_logger(context.rank, "train"), components.length.max_steps
    record, best = Record(start.run_dir, components), Best(config, data.valid, context.rank)
    hooks = _hooks(components, data, start.run_dir, record, best)
    first_step = _restore(components, hooks, start, best)
    if (reason := reason_to_end(config, components.length, first_step, best.found)) is not None:
        log.info(reason)
        return {}
    _say_start(components, data, first_step)
    sampler = make_sampler(config, data, context.dp_rank, context.dp_size)
    began, metrics = time.perf_counter(), {}
    with hooks, _checkpoint_writer(components, start.run_dir) as writer:
        hooks.run_started(first_step)
        for step in range(first_step, max_steps):
            done = step + 1
            if heartbeat is not None:
                heartbeat.step = step
            hooks.step_started(done)
            result = distillation_step(step, data.batch(sampler, step), components)
            hooks.step_ended(StepEvent(done, result))
            metrics = result.metrics
            status = _sync_step_status(request, writer, record, best, done, context)
            if status.is_unrecorded:
                context.raise_on_all_ranks(record.error)
            writer.advance(status.writer)
            is_last = done == max_steps or status.is_over
            if is_last or status.stop_signal or status.is_best or _is_save_due(config, done):
                is_hurried = status.stop_signal is not None and not is_last
                writer.begin(done, _trainer_state(components, hooks), best.kept_step, is_hurried=is_hurried)
                hooks.saved(done)
            if is_last:
                break
            if status.stop_signal:
                writer.finish()
                hooks.stopped(done, status.stop_signal)
                log.info(f"{status.stop_signal}: checkpoint saved at step {done}. Rerun the same command to resume.")
                return {"stopped": status.stop_signal, "step": done}
        writer.finish()
        hooks.finished(done)
    summary = {
        "steps": done,
        "epochs": components.length.epochs(done),
        "steps_per_epoch": components.length.steps_per_epoch,
        "seconds": time.perf_counter() - began,
        "resumed_from": first_step,
        "processes": context.world_size,
        "tp_size": context.tp_size,
        "dp_size": context.dp_size,
        "data": data.report,
        "last_step": metrics,
        **hooks.summary(),
    }
    _finish(components, start.run_dir, summary, best)
    return summary


def _say_start(components: Components, data: TrainingData, first_step: int) -> None:
    """What the run is, and a warning of each thing about it that its user may not want."""
    config, length = components.config, components.length
    log = get_logger(components.context.rank, "train")
    log.info(_headline(components, data))
    sizes = num_parameters(components.student), num_parameters(components.teacher)
    for text in (
        *data_warnings(config, data.report),
        *run_warnings(config, length, length.max_steps - first_step, sizes),
    ):
        log.warning(text)


def _finish(components: Components, run_dir: Path, summary: dict[str, Any], best: Best) -> None:
    """Writes summary.json, and says where everything is, how good the student is, and what comes next."""
    context, steps, file = components.context, summary["steps"], run_dir / "summary.json"
    log = get_logger(context.rank, "train")
    context.run_on_rank0(lambda: write_json(file, summary), file)
    if best.is_over and steps < components.length.max_steps:
        log.info(f"stopped early at step {steps} of {components.length.max_steps}: {early_words(best.found)}")
    log.info(f"done: {run_dir / 'checkpoints' / f'step_{steps}'}; metrics are in {run_dir}")
    for line in end_lines(components.config, run_dir, steps, summary["validation"], best.found):
        log.info(line)


def _hooks(components: Components, data: TrainingData, run_dir: Path, record: Record, best: Best) -> HookList:
    """The hooks of a run, in order: those that add to a step's metrics come before the record."""
    hooks, profile_steps = HookList(), components.config.train.profile_steps
    hooks.add(
        Throughput(components),
        Validation(components, run_dir, data.valid, notify=hooks.validated),
        Inputs(components, data),
        best,
        record,
        NonFinite(run_dir, components),
        Progress(components),
    )
    if components.config.run.trackers:
        hooks.add(Track(run_dir, components))
    if profile_steps is not None:
        hooks.add(Profile(run_dir, components.context, *profile_steps))
    return hooks


def _restore(components: Components, hooks: Hook, start: Start, best: Best) -> int:
    """Makes the run directory, loads the checkpoint if there is one; returns the number of updates already done."""
    config, context = components.config, components.context
    first_step, loaded_from = 0, None
    if start.checkpoints:
        loaded_from, first_step, state = load_checkpoint(
            start.checkpoints,
            components.student,
            _trainer_state(components, hooks),
            context,
            max_steps=components.length.max_steps,
        )
        if components.gate is not None:
            components.gate.load_state_dict(state["gate"])
        for schedule in components.schedules:
            schedule.load_state_dict(state)
        components.source.load_state_dict(state)
        hooks.load_state_dict(state)
        get_logger(context.rank, "train").info(f"resumed from {loaded_from} at step {first_step}")

    def make() -> bool:
        start.run_dir.mkdir(parents=True, exist_ok=True)
        dump_resolved(config, start.run_dir / RESOLVED)
        record_commits(start.run_dir, components.hub_commits)
        folder = start.run_dir / "checkpoints"
        if loaded_from is not None and loaded_from.parent.resolve() == folder.resolve():
            point_to_latest(loaded_from)  # only now: nothing has refused it; metrics.jsonl goes back to this step, too
        is_there = best.kept_step is not None and (folder / f"step_{best.kept_step}" / MANIFEST).is_file()
        point_to_best(folder, best.kept_step if is_there else None)
        return is_there

    # A run that began at a checkpoint of another one, or went back, may remember a best one that it does not have.
    if not context.run_on_rank0(make, start.run_dir) and best.kept_step is not None:
        best.forget()
    return first_step


def _trainer_state(components: Components, hooks: Hook) -> dict[str, Any]:
    """What a checkpoint holds besides the student, the same on every rank and layout."""
    own: dict[str, Any] = {} if components.gate is None else {"gate": components.gate.state_dict()}
    for schedule in components.schedules:
        own |= schedule.state_dict()
    return own | components.source.state_dict() | hooks.state_dict()


def _is_save_due(config: RunConfig, done: int) -> bool:
    every = config.train.save_every
    return every > 0 and done % every == 0


def _checkpoint_writer(components: Components, run_dir: Path) -> CheckpointWriter:
    config, context, settings = components.config, components.context, components.config.checkpoint
    carried: list[Carried] = []  # on rank 0: the others need none of it

    def collect() -> None:
        folders, loaded = components.model_folders, components.student.loaded
        tokenizer_path = next(iter(tokenizer_paths(config, folders).values()))
        files = carried_files(
            folders["model.student.path"], tokenizer_path, components.tokenizer, components.eos_ids, loaded.config
        )
        carried.append(for_auto_tokenizer(files, loaded.config, tokenizer_path))

    context.run_on_rank0(collect)
    return CheckpointWriter(
        run_dir / "checkpoints",
        components.student,
        carried[0] if carried else None,
        context,
        keep=Keep(settings.keep_last, settings.keep_every, settings.keep_every_weights_only),
        asynchronous=settings.asynchronous,
    )


class _StepStatus(NamedTuple):
    """What every rank must know after a step.

    Attributes:
        stop_signal: Name of a signal that any rank received, or None.
        writer: Status of the slowest checkpoint writer.
        is_unrecorded: Rank 0 could not record the step.
        is_best: The validation of this step is the best one, and its checkpoint is to be kept.
        is_over: Validations have not improved for so long that this is the last step.
    """

    stop_signal: str | None
    writer: int
    is_unrecorded: bool
    is_best: bool
    is_over: bool


def _sync_step_status(
    request: StopRequest, writer: CheckpointWriter, record: Record, best: Best, done: int, context: ParallelContext
) -> _StepStatus:
    """Agrees on the status after step ``done`` (one all-reduce of five numbers over the world)."""
    flags = (record.error is not None, best.kept_step == done, best.is_over)
    mine = [float(number) for number in (request.signal, writer.status, *flags)]
    number, status, *agreed = context.max_over_world(torch.tensor(mine, device=context.device)).tolist()
    return _StepStatus(signal.Signals(int(number)).name if number else None, int(status), *map(bool, agreed))


def _adapters(student: Student) -> str:
    if student.loaded.lora is None:
        return ""
    trained, whole = num_trained(student), num_parameters(student)
    return f" (adapters of rank {student.loaded.lora.config.r}, {100 * trained / whole:.2g} % of the weights)"


def _headline(components: Components, data: TrainingData) -> str:
    config, context = components.config, components.context
    backend = choose_backend(config.loss.backend, components.student.shard, context.device)
    student, teacher = config.model.student.path, config.model.teacher.path
    missing = data.report.get("train/without_reference", 0) if config.needs_teacher else 0
    return (
        f"{f'{teacher} -> {student}' if config.needs_teacher else f'SFT of {student}'}"
        f"{_adapters(components.student)}: "
        f"tp {context.tp_size} x dp {context.dp_size}, ZeRO-{config.parallel.zero_stage}, {context.device.type}, "
        f"losses by {backend}; {len(data.train)} rows"
        + (f" ({missing} of them without a reference)" if missing else "")
        + (f", {len(data.prompts)} extra prompts" if data.prompts else "")
        + f"; {length_words(components.length, config.train.global_batch_size)}"
    )
