"""``megadistill train``: the main job. ``launchers/run.sh`` starts exactly this on every rank."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from megadistill.cli.parsing import Parser, ask_hub_only_if_there, config_of, refuse_unwritable
from megadistill.cli.preparers import prepare
from megadistill.errors import ExitCode
from megadistill.launch.launchers import rank_of
from megadistill.observability.log import get_logger

if TYPE_CHECKING:
    from megadistill.config.schema import RunConfig
    from megadistill.launch.stopping import StopRequest
    from megadistill.training.data import TrainingData
    from megadistill.training.resume import Start


def run(arguments: Sequence[str]) -> int:
    """Runs the verb; returns its exit code."""
    parser = Parser(
        "train",
        "Distills model.teacher into model.student, in all processes of a launcher; without one, in one process.",
        "examples:\n"
        "  deepspeed launchers/run.sh --config configs/demo.yaml\n"
        "  megadistill train --config configs/smoke.yaml train.max_steps=5 run.dir=runs/try",
    )
    parser.add_config()
    parsed = parser.parse(arguments)
    from megadistill.launch.stopping import stop_requests

    # Before anything is loaded: a signal meanwhile stops the run after its first step, and a launcher that dies
    # meanwhile leaves no process behind.
    with stop_requests() as request:
        config = config_of(parsed)
        request.grace_s = config.train.stop_grace_s
        log = get_logger(rank_of(os.environ), "train")
        log.info(f"{parsed.config} -> {config.run.dir}: loading torch, transformers and DeepSpeed")
        return ExitCode.STOPPED if "stopped" in train_run(config, request) else ExitCode.DONE


def train_run(config: RunConfig, request: StopRequest) -> dict[str, Any]:
    """Carries out a run, from its checkpoint where there is one (collective over the processes of the launcher).

    Args:
        config: Its settings.
        request: Asks it to stop.

    Returns:
        As ``training.loop.train``; ``{"stopped": ...}`` also where it was asked to stop before it began.

    Raises:
        MegadistillError: The user's mistakes.
    """
    from megadistill.launch.ranks import set_rank_variables

    num_ranks = set_rank_variables()  # first: what follows asks for the rank
    refuse_unwritable(config.run.dir, is_file=False)
    if config.generation.teacher_cache is not None:
        refuse_unwritable(config.generation.teacher_cache, is_file=True)
    with _without_garbage_collection():
        from megadistill.launch.world import distributed, name_accelerator

        name_accelerator()
        from megadistill.data.row_store import PreparationStopped
        from megadistill.launch.heartbeat import lost_ranks_reported
        from megadistill.launch.machine import say_machines
        from megadistill.parallel.context import ParallelContext
        from megadistill.training.data import load_training_data
        from megadistill.training.finished import finished
        from megadistill.training.hooks.best import check_best
        from megadistill.training.length import RunLength
        from megadistill.training.loop import train
        from megadistill.training.resume import plan_start
        from megadistill.training.setup import build_components, check_adapters, check_models, run_tokenizer

        if not prepare(config, lambda: bool(request.signal)):
            return {"stopped": signal.Signals(request.signal).name, "step": 0}
        ask_hub_only_if_there([config.model.teacher.path, config.model.student.path, config.model.tokenizer])
        # Mistakes in the user's files are found here, before processes wait for one another.
        start = plan_start(config)
        check_adapters(config)
        tp_size = check_models(config, num_ranks)  # imports transformers
        tokenizer, vocab_size = run_tokenizer(config)
    try:
        data = load_training_data(config, tokenizer, vocab_size, lambda: bool(request.signal))
    except PreparationStopped:
        return {"stopped": signal.Signals(request.signal).name, "step": 0}
    _say(data, start)
    config = config.with_template(data.template)  # resolved.yaml has what auto meant
    length = RunLength.of(config, data)  # finds out whether the rows can fill a step
    check_best(config, data.valid)
    with distributed(config.parallel.timeout_s) as device:
        context = ParallelContext.build(tp_size, config.parallel.timeout_s, device)
        with lost_ranks_reported(context) as heartbeat:
            say_machines(context)
            if (reason := finished(config, length, data.valid, context)) is not None:
                get_logger(context.rank, "train").info(reason)
                return {}
            components = build_components(config, context, tokenizer, vocab_size, data, length)
            return train(components, data, start, request, heartbeat)


def _say(data: TrainingData, start: Start) -> None:
    """What was read, and what an earlier release did otherwise."""
    log = get_logger(rank_of(os.environ), "data")
    for line in data.sources:
        log.info(f"{line}; template {data.template}")
    for line in start.changes():
        log.warning(line)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Modules are never garbage, but looking through them again and again takes a fifth of the time of importing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
