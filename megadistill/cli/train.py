"""``megadistill train``: the main job. ``launchers/run.sh`` starts exactly this on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megadistill.cli.parsing import Parser, ask_hub_only_if_there, config_of, refuse_unwritable
from megadistill.cli.preparers import prepare

if TYPE_CHECKING:
    from megadistill.config.schema import RunConfig
    from megadistill.launch.stopping import StopRequest


def run(arguments: Sequence[str]) -> int:
    parser = Parser(
        "train",
        "Distils model.teacher into model.student. Started by a launcher it uses all its processes; alone, one.",
        "examples:\n"
        "  deepspeed launchers/run.sh --config configs/demo.yaml\n"
        "  megadistill train --config configs/smoke.yaml train.max_steps=5 run.dir=runs/try",
    )
    parser.add_config()
    from megadistill.launch.stopping import stop_requests

    # From now on, so that a signal while models are loaded is no crash (the run stops after its first step), and that a
    # launcher that dies meanwhile leaves nobody behind.
    with stop_requests() as request:
        config = config_of(parser.parse(arguments))
        request.grace_s = config.train.stop_grace_s
        return _train(config, request)


def _train(config: RunConfig, request: StopRequest) -> int:
    from megadistill.launch.heartbeat import lost_ranks_reported
    from megadistill.launch.stopping import STOPPED
    from megadistill.launch.world import distributed, world_size
    from megadistill.parallel.context import ParallelContext
    from megadistill.training.data import load_training_data, make_sampler
    from megadistill.training.loop import train
    from megadistill.training.resume import plan_start
    from megadistill.training.setup import build_components, check_models, run_tokenizer

    num_ranks = world_size()  # first of all: what follows asks who is rank 0
    refuse_unwritable(config.run.dir, is_file=False)
    if config.generation.teacher_cache is not None:
        refuse_unwritable(config.generation.teacher_cache, is_file=True)
    if not prepare(config, lambda: bool(request.signal)):
        return STOPPED
    ask_hub_only_if_there([config.model.teacher.path, config.model.student.path, config.model.tokenizer])
    # What can be wrong with the user's files is found before processes wait for one another.
    start = plan_start(config)
    tp_size = check_models(config, num_ranks)
    tokenizer = run_tokenizer(config)
    data = load_training_data(config, tokenizer)
    make_sampler(config, data)
    with distributed(config.parallel.timeout_s) as device:
        context = ParallelContext.build(tp_size, config.parallel.timeout_s, device)
        with lost_ranks_reported(context) as heartbeat:
            components = build_components(config, context, tokenizer, [*data.train, *data.prompts])
            return STOPPED if "stopped" in train(components, data, start, request, heartbeat) else 0
