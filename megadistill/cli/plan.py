"""``megadistill plan``: memory, communication and time of a step before anyone rents the machines."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megadistill.cli.machines import add_machines, gpu_of, memory_of
from megadistill.cli.parsing import Parser, config_of, refuse_unwritable, value_of
from megadistill.cli.preparers import models_to_make
from megadistill.config.section import PositiveInt
from megadistill.errors import ConfigError, ExitCode
from megadistill.files import write_json

if TYPE_CHECKING:
    from megadistill.planning.case import Case
    from megadistill.planning.report import Plan
    from megadistill.planning.use import StepUse

DOES_NOT_FIT = 1
_PICTURES = (".png", ".pdf", ".svg")


def run(arguments: Sequence[str]) -> int:
    """Runs the verb; returns 0 where the step fits, 1 where it does not (with --sweep: where nothing does)."""
    parsed = _parser().parse(arguments)
    config = config_of(parsed)
    if parsed.json not in (None, "-"):
        refuse_unwritable(parsed.json, is_file=True)
    if parsed.plot is not None:
        if Path(parsed.plot).suffix.lower() not in _PICTURES:
            raise ConfigError(f"--plot {parsed.plot}: the name must end in {' or '.join(_PICTURES)}")
        refuse_unwritable(parsed.plot, is_file=True)
    from megadistill.planning.case import Case, Models
    from megadistill.planning.known import with_configurations

    with tempfile.TemporaryDirectory() as folder:
        described, notes = with_configurations(config, models_to_make(config), Path(folder))
        case = Case.of(
            described,
            Models.of(described),
            nodes=parsed.nodes,
            gpus_per_node=parsed.gpus_per_node,
            gpu_memory=memory_of(parsed),
            prompt_tokens=parsed.prompt_tokens,
            response_tokens=parsed.response_tokens,
            like_gpu=not parsed.cpu,
            is_checked=not parsed.sweep,
        )
        plan = _planned(parsed, case, notes)
    _write(parsed, plan)
    if plan.layouts is not None:
        return ExitCode.DONE if plan.layouts else DOES_NOT_FIT
    return ExitCode.DONE if plan.is_fitting else DOES_NOT_FIT


def _parser() -> Parser:
    parser = Parser(
        "plan",
        "Predicts memory, communication and seconds of a step from configurations alone: no GPU, no weights, no data.\n"
        "What does not fit comes with the nearest setting that does. Exit code 0: the step fits; 1: it does not (with\n"
        "--sweep: nothing does); 2: wrong usage.",
        "examples:\n"
        "  megadistill plan --config configs/llama-13b_to_7b.yaml\n"
        "  megadistill plan --config configs/llama-13b_to_7b.yaml --nodes 2 --sweep\n"
        "  megadistill plan --config configs/qwen3-8b_to_1.7b.yaml --gpus-per-node 4 --gpu A100-40 parallel.tp_size=2\n"
        "\ndocs/planning.md explains the output, and what is not counted.",
    )
    parser.add_config()
    add_machines(parser)
    number = value_of(PositiveInt)
    parser.add_argument(
        "--prompt-tokens", type=number, metavar="N", help="length of prompts; default: data.max_prompt_tokens"
    )
    parser.add_argument(
        "--response-tokens", type=number, metavar="N",
        help="length of responses and references; default: the most that generation.max_new_tokens and "
        "data.max_tokens allow",
    )  # fmt: skip
    parser.add_argument(
        "--exact", action="store_true",
        help="run the real step of rank 0 without computing anything, and show the formulas beside it (minutes)",
    )  # fmt: skip
    parser.add_argument("--sweep", action="store_true", help="rank all layouts that fit by seconds a step")
    parser.add_argument(
        "--rates", metavar="FILE", help="metrics.jsonl of a finished run on such GPUs: correct the times by its own"
    )
    parser.add_argument("--json", metavar="FILE", help="write every number to FILE; -: to standard output, alone")
    parser.add_argument("--plot", metavar="FILE", help=f"draw memory by owner and phase ({', '.join(_PICTURES)})")
    return parser


def _planned(parsed: argparse.Namespace, case: Case, notes: Sequence[str]) -> Plan:
    from megadistill.planning.compare import compare
    from megadistill.planning.formulas import step_use
    from megadistill.planning.report import Plan
    from megadistill.planning.search import fits, left_out, nearest, sweep
    from megadistill.planning.times import measured_factors, phase_times

    if parsed.exact and parsed.sweep:
        raise ConfigError("--exact runs one layout and --sweep compares all of them: give one of the two")
    gpu = gpu_of(parsed)
    factors = {} if parsed.rates is None else measured_factors(Path(parsed.rates), gpu, case.gpus_per_node)
    layouts = sweep(case, gpu, factors) if parsed.sweep else None
    if layouts:
        notes = [*notes, *filter(None, [left_out(case, layouts)])]
        case = layouts[0].case
    case.check()
    use = formula = step_use(case)
    if parsed.exact:
        use = _dry_run(case)
        formula = step_use(case.with_settings({"loss.backend": "torch"}))  # as a dry run has it
    return Plan(
        case=case,
        gpu=gpu,
        use=use,
        times=phase_times(case, use, gpu, factors),
        notes=notes,
        comparison=compare(formula, use) if parsed.exact else None,
        nearest=None if parsed.sweep or fits(case, use) else nearest(case, gpu, factors),
        layouts=layouts,
    )


def _dry_run(case: Case) -> StepUse:
    from megadistill.planning.dry_run import dry_run_in_process

    return dry_run_in_process(
        case.config,
        rank=0,
        world_size=case.world_size,
        like_gpu=case.like_gpu,
        gpu_memory=case.gpu_memory,
        prompt_tokens=case.prompt_tokens,
        response_tokens=case.response_tokens,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )


def _write(parsed: argparse.Namespace, plan: Plan) -> None:
    from megadistill.files import to_jsonable
    from megadistill.planning.report import as_dict, bars, text

    if parsed.json == "-":
        print(json.dumps(to_jsonable(as_dict(plan)), indent=2))
    else:
        print(text(plan))
        if parsed.json is not None:
            write_json(parsed.json, as_dict(plan))
    if parsed.plot is not None:
        from megadistill.observability.plots import stacked_bars

        case = plan.case
        stacked_bars(
            bars(plan), Path(parsed.plot), limit=case.gpu_memory / 1e9, limit_label=plan.gpu.name, unit="GB",
            title=f"tp {case.tp_size} x dp {case.dp_size}, ZeRO-{case.zero_stage}: memory of a rank",
        )  # fmt: skip
