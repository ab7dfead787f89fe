"""``megadistill doctor``: a preflight of a machine or an allocation, launched as training is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megadistill.cli.parsing import Parser, config_of, value_of
from megadistill.config.section import PositiveFloat
from megadistill.errors import ExitCode

if TYPE_CHECKING:
    from megadistill.planning.findings import Finding

FAILED = 1


def run(arguments: Sequence[str]) -> int:
    """Runs the verb; returns 0 where nothing failed, 1 where something did, on all ranks."""
    parser = Parser(
        "doctor",
        "Examines a machine, or with a launcher all processes of a job: ranks, versions, collectives of each group,\n"
        "clocks, memory, disk, models and tokenizers. Exit code 0: nothing failed; 1: something did; 2: wrong usage.",
        "examples:\n"
        "  megadistill doctor\n"
        "  bash launchers/run.sh doctor --config configs/demo.yaml\n"
        "  sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 launchers/slurm.sbatch doctor --config FILE\n\n"
        "Absent and hung ranks are named. Nothing is written but two small files in\n"
        "run.dir, which are removed again.",
    )
    parser.add_config(required=False)
    parser.add_argument(
        "--timeout-s", type=value_of(PositiveFloat), default=30.0, metavar="S",
        help="seconds that ranks have for each stage, and four times as many to come; default: 30",
    )  # fmt: skip
    parsed = parser.parse(arguments)
    if parsed.config is None and parsed.overrides:
        parser.error(f"{parsed.overrides[0]} needs --config FILE")
    config = None if parsed.config is None else config_of(parsed)
    from megadistill.launch.group_check import leave
    from megadistill.launch.world import place_in_job

    with place_in_job() as (rank, world_size, device):
        from megadistill.planning.doctor import examine

        failures, is_stuck = examine(config, rank, world_size, device, parsed.timeout_s, _print)
    code = FAILED if failures else ExitCode.DONE
    if is_stuck:
        sys.stderr.flush()
        leave(code)
    return code


def _print(findings: list[Finding]) -> None:
    from megadistill.observability.log import printable
    from megadistill.observability.redact import redact
    from megadistill.planning.findings import table

    print(printable(redact(table(findings))), flush=True)
