"""``megadistill reshard CHECKPOINT FOLDER --tp-size N --dp-size M``."""

from __future__ import annotations

from collections.abc import Sequence

from megadistill.cli.parsing import Parser, refuse_unwritable


def run(arguments: Sequence[str]) -> int:
    """Runs the verb; returns its exit code."""
    parser = Parser(
        "reshard",
        "Writes a checkpoint as a run of tp-size x dp-size processes (ZeRO-3) would have written it. A run reads any\n"
        "layout; its own layout is faster, because each process reads only its part.",
        "example:\n"
        "  megadistill reshard runs/mine resharded/step_1000 --tp-size 4 --dp-size 8\n"
        "  deepspeed launchers/run.sh --config FILE run.dir=runs/more train.resume=resharded/step_1000",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a step_N folder, or a run directory: its latest one")
    parser.add_new_folder()
    parser.add_layout()
    parsed = parser.parse(arguments)
    refuse_unwritable(parsed.folder, is_file=False)

    from megadistill.checkpoint.reshard import reshard_checkpoint

    source = reshard_checkpoint(parsed.checkpoint, parsed.folder, tp_size=parsed.tp_size, dp_size=parsed.dp_size)
    print(
        f"{source} for tp {parsed.tp_size} x dp {parsed.dp_size}: {parsed.folder}; "
        f"resume from it with train.resume={parsed.folder}"
    )
    return 0
