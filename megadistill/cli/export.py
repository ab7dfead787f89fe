"""``megadistill export CHECKPOINT FOLDER``."""

from __future__ import annotations

from collections.abc import Sequence

from megadistill.cli.parsing import Parser, refuse_unwritable, size


def run(arguments: Sequence[str]) -> int:
    """Runs the verb; returns its exit code."""
    parser = Parser(
        "export",
        "Writes the student of a checkpoint as a Hugging Face folder: weights (safetensors), configuration, tokenizer.",
        "examples:\n  megadistill export runs/demo exported/student\n"
        "  megadistill export runs/demo/checkpoints/step_100 exported/student --dtype bf16 --max-shard-size 2GB",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a step_N folder, or a run directory: its latest one")
    parser.add_new_folder()
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="type of the weights; default: as trained")
    parser.add_argument(
        "--max-shard-size", type=size, metavar="SIZE", help="largest file, such as 500MB; default: 4GiB"
    )
    parsed = parser.parse(arguments)

    from megadistill.checkpoint.hf_export import export_checkpoint

    refuse_unwritable(parsed.folder, is_file=False)
    source = export_checkpoint(
        parsed.checkpoint, parsed.folder, dtype=parsed.dtype, max_shard_bytes=parsed.max_shard_size
    )
    print(f"exported {source} to {parsed.folder}; load it with AutoModelForCausalLM.from_pretrained('{parsed.folder}')")
    return 0
