"""``megadistill shard MODEL FOLDER --tp-size N``."""

from __future__ import annotations

from collections.abc import Sequence

from megadistill.cli.parsing import Parser, refuse_unwritable


def run(arguments: Sequence[str]) -> int:
    """Runs the verb; returns its exit code."""
    parser = Parser(
        "shard",
        "Writes a Hugging Face model as one file per rank. Give the folder to a run in place of the model: each\n"
        "process then reads only its part and never holds the whole model. Any layout can read it; the one that it\n"
        "was written for reads least.",
        "example:\n"
        "  megadistill shard models/teacher-13b sharded/teacher --tp-size 8 --dtype bf16\n"
        "  deepspeed launchers/run.sh --config FILE model.teacher.path=sharded/teacher model.teacher.dtype=bf16",
    )
    parser.add_argument("model", metavar="MODEL", help="model folder, hub name, checkpoint or run directory")
    parser.add_new_folder()
    parser.add_layout(default_dp_size=1)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="type of the weights; default: the model's own")
    parser.add_argument("--tokenizer", metavar="PATH", help="the run's tokenizer; default: the model's own")
    parsed = parser.parse(arguments)
    refuse_unwritable(parsed.folder, is_file=False)

    from megadistill.checkpoint.model_folder import model_folder
    from megadistill.checkpoint.reshard import shard_model

    shard_model(
        model_folder(parsed.model),
        parsed.folder,
        tp_size=parsed.tp_size,
        dp_size=parsed.dp_size,
        dtype=parsed.dtype,
        tokenizer=parsed.tokenizer and model_folder(parsed.tokenizer),
    )
    print(f"{parsed.model} for tp {parsed.tp_size}: {parsed.folder}")
    return 0
