"""The run: steps, validation, checkpoints, and what is written down."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from megadistill.checkpoint.save_load import load_checkpoint
from megadistill.checkpoint.writer import CheckpointWriter
from megadistill.config.load import dump_resolved
from megadistill.config.schema import RunConfig
from megadistill.evaluation.answers import AnswerSettings, reference_likelihood, write_answers
from megadistill.evaluation.report import write_json
from megadistill.evaluation.rouge import score_texts
from megadistill.generation.replay_buffer import merge, split
from megadistill.launch.heartbeat import Heartbeat
from megadistill.launch.stopping import StopRequest
from megadistill.losses.backends import choose_backend
from megadistill.observability.lock import exclusive_lock
from megadistill.observability.log import get_logger
from megadistill.observability.memory import peak_bytes, reset_peak
from megadistill.observability.progress import progress_bar
from megadistill.parallel.context import ParallelContext
from megadistill.training.components import Components
from megadistill.training.nonfinite import NonFinite
from megadistill.training.record import Record
from megadistill.training.resume import RESOLVED, Start, plan_start
from megadistill.training.setup import TrainingData, make_sampler
from megadistill.training.step import distillation_step


def train(
    components: Components,
    data: TrainingData,
    start: Start,
    request: StopRequest | None = None,
    heartbeat: Heartbeat | None = None,
) -> dict[str, Any]:
    """Runs from ``start`` to ``train.max_steps`` and returns what summary.json holds (collective over the world).

    A run that is asked to stop (``request``) saves after its step and returns ``stopped``, the signal's name, instead.

    Raises ConfigError, on every rank, when another run writes the same folder.
    """
    with ExitStack() as held:

        def lock() -> Start:
            held.enter_context(exclusive_lock(start.run_dir / ".lock", f"run.dir={start.run_dir}"))
            return plan_start(components.config)  # again: the one that held it may have saved since

        start = components.context.run_on_rank0(lock)
        return _train(components, data, start, request or StopRequest(), heartbeat)


def _train(
    components: Components, data: TrainingData, start: Start, request: StopRequest, heartbeat: Heartbeat | None
) -> dict[str, Any]:
    config, context = components.config, components.context
    log = get_logger(context.rank)
    sampler = make_sampler(config, data, context.dp_rank, context.dp_size)
    first_step = _restore(components, start)
    log.info(_headline(components, data))
    if first_step == config.train.max_steps:
        log.info(f"{start.run_dir}: all {first_step} steps are done; a larger train.max_steps goes on")
        return {}
    begun, metrics, last_eval = time.perf_counter(), {}, {}
    writer, nonfinite = _writer(components, start.run_dir), NonFinite(start.run_dir, components)
    if first_step == 0 and components.policy.schedule is not None and config.train.eval_every:
        before = validate(components, data)
        log.info("step 0: " + _shown(before))
        _observe(components, before)  # what phi compares the first validation with
    with (
        Record(start.run_dir, context, first_step) as record,
        writer,
        progress_bar(
            description="train", total=config.train.max_steps, initial=first_step, unit="step", rank=context.rank
        ) as bar,
    ):
        for step in range(first_step, config.train.max_steps):
            step_begun, done = time.perf_counter(), step + 1
            if heartbeat is not None:
                heartbeat.step = step
            reset_peak(context.device)
            result = distillation_step(step, data.batch(sampler, step), components)
            metrics = result.metrics
            metrics["time/step_s"] = time.perf_counter() - step_begun
            metrics["memory/peak_bytes"] = float(peak_bytes(context.device))
            if config.train.eval_every and (done % config.train.eval_every == 0 or done == config.train.max_steps):
                last_eval = validate(components, data)
                _observe(components, last_eval)
                metrics |= last_eval
                log.info(f"step {done}: " + _shown(last_eval))
            record.write(done, metrics, context.gather_objects_over_dp(result.samples))
            nonfinite.seen(done, result)
            bar.update()
            if done % config.train.log_every == 0:
                bar.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
            stopped, status, is_unwritten = _sync_step_status(request, writer, record, context)
            if is_unwritten:
                context.raise_on_all_ranks(record.error)
            writer.advance(status)
            if _saves(config, done) or stopped:
                writer.begin(done, _trainer_state(components))
            if stopped and done < config.train.max_steps:
                writer.finish()
                log.info(f"{stopped}: stopped after step {done}, which is saved; the same command goes on")
                return {"stopped": stopped, "step": done}
        writer.finish()
    summary = {
        "steps": config.train.max_steps,
        "seconds": time.perf_counter() - begun,
        "resumed_from": first_step,
        "processes": context.world_size,
        "tp_size": context.tp_size,
        "dp_size": context.dp_size,
        "data": data.report,
        "last_step": metrics,
        "validation": last_eval,
    }
    file = start.run_dir / "summary.json"
    context.run_on_rank0(lambda: write_json(file, summary), file)
    log.info(f"done: {start.run_dir / 'checkpoints' / f'step_{config.train.max_steps}'}; metrics in {start.run_dir}")
    return summary


def validate(components: Components, data: TrainingData) -> dict[str, float]:
    """Likelihood of the references of the first ``train.eval_rows`` validation rows, and ROUGE-L of greedy answers."""
    config = components.config
    rows = data.valid[: config.train.eval_rows]
    settings = AnswerSettings(
        components.tokenizer,
        config.generation.max_new_tokens,
        config.data.max_tokens,
        batch_size=min(config.eval.batch_size, components.decode_plan.most_rows),
    )
    with components.student.decoder() as writer:
        likelihood = reference_likelihood(writer, rows, settings, components.context)
        answers = write_answers(writer, rows, None, settings, components.context)
    scores = score_texts(answers, [row.references for row in rows])
    found = {
        "eval/nll": likelihood.nll if likelihood.num_tokens else None,
        "eval/rouge_l": scores.rouge_l,
        "eval/exact_match": scores.exact_match,
    }
    return {name: value for name, value in found.items() if value is not None}


def _shown(numbers: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())


def _observe(components: Components, validation: dict[str, float]) -> None:
    """Lets phi follow the validation loss (mode off_policy)."""
    if components.policy.schedule is not None and "eval/nll" in validation:
        components.policy.schedule.observe(validation["eval/nll"])


def _restore(components: Components, start: Start) -> int:
    """Makes the run directory, loads the checkpoint if there is one; returns the number of updates already done."""
    config, context = components.config, components.context
    first_step = 0
    if start.checkpoints:
        own = start.run_dir / "checkpoints"
        found, first_step, state = load_checkpoint(
            start.checkpoints,
            own,
            components.student,
            _trainer_state(components),
            context,
            max_steps=config.train.max_steps,
        )
        _load_trainer_state(components, state)
        get_logger(context.rank).info(f"resumed from {found} at step {first_step}")

    def make() -> None:
        start.run_dir.mkdir(parents=True, exist_ok=True)
        dump_resolved(config, start.run_dir / RESOLVED)

    context.run_on_rank0(make, start.run_dir)
    return first_step


def _saves(config: RunConfig, done: int) -> bool:
    every = config.train.save_every
    return done == config.train.max_steps or (every > 0 and done % every == 0)


def _trainer_state(components: Components) -> dict[str, Any]:
    """What a checkpoint holds beside the student, the same on every rank and at every layout (the replay buffer is
    gathered over the data-parallel group)."""
    state: dict[str, Any] = {} if components.gate is None else {"gate": components.gate.state_dict()}
    if components.policy.schedule is not None and components.policy.buffer is not None:
        shards = components.context.gather_objects_over_dp(components.policy.buffer.state_dict())
        state["off_policy"] = {"schedule": components.policy.schedule.state_dict(), "buffer": merge(shards)}
    return state


def _load_trainer_state(components: Components, state: dict[str, Any]) -> None:
    if components.gate is not None:
        components.gate.load_state_dict(state["gate"])
    if components.policy.schedule is not None and components.policy.buffer is not None:
        if "off_policy" not in state:
            log = get_logger(components.context.rank)
            log.info("the checkpoint is of another generation.mode: the replay buffer starts empty, phi as configured")
            return
        components.policy.schedule.load_state_dict(state["off_policy"]["schedule"])
        shard = split(state["off_policy"]["buffer"], components.context.dp_rank, components.context.dp_size)
        components.policy.buffer.load_state_dict(shard)


def _writer(components: Components, run_dir: Path) -> CheckpointWriter:
    settings = components.config.checkpoint
    return CheckpointWriter(
        run_dir / "checkpoints",
        components.student,
        components.tokenizer,
        components.context,
        keep_last=settings.keep_last,
        keep_every=settings.keep_every,
        asynchronous=settings.asynchronous,
    )


def _sync_step_status(
    request: StopRequest, writer: CheckpointWriter, record: Record, context: ParallelContext
) -> tuple[str | None, int, bool]:
    """What every rank must know after a step: the name of a signal that any of them got, whether all of them have
    written their part of a checkpoint, and whether rank 0 could not write the step down (one all-reduce of three
    numbers over the world)."""
    mine = [float(request.signal), float(writer.status), float(record.error is not None)]
    number, status, is_unwritten = context.max_over_world(torch.tensor(mine, device=context.device)).tolist()
    return signal.Signals(int(number)).name if number else None, int(status), bool(is_unwritten)


def _headline(components: Components, data: TrainingData) -> str:
    config, context = components.config, components.context
    backend = choose_backend(config.loss.backend, components.student.shard, context.device)
    return (
        f"{config.model.teacher.path if config.needs_teacher else 'no teacher'} -> {config.model.student.path}: "
        f"tp {context.tp_size} x dp {context.dp_size}, ZeRO-{config.parallel.zero_stage}, {context.device.type}, "
        f"losses by {backend}; "
        f"{len(data.train)} rows, {len(data.prompts)} extra prompts"
        + "".join(f"; {name} {count}" for name, count in data.report.items() if not name.endswith("/rows"))
    )
