"""``megadistill export CHECKPOINT FOLDER``, and on to a hub."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megadistill.cli.parsing import Parser, refuse_unwritable, size
from megadistill.errors import CheckpointError, ConfigError


def run(arguments: Sequence[str]) -> int:
    """Runs the verb; returns its exit code."""
    parsed = _parser().parse(arguments)
    _check(parsed)

    from megadistill.checkpoint.adapter_export import has_adapters
    from megadistill.checkpoint.hf_export import export_checkpoint
    from megadistill.checkpoint.push import check_push

    if parsed.push is not None:
        _check_whole(parsed)
        check_push(parsed.push)  # before the work
    if parsed.folder is None:
        return _push(Path(parsed.checkpoint), parsed)
    refuse_unwritable(parsed.folder, is_file=False)
    source = export_checkpoint(
        parsed.checkpoint,
        parsed.folder,
        dtype=parsed.dtype,
        max_shard_bytes=parsed.max_shard_size,
        is_merged=parsed.merged,
    )
    loader = "AutoPeftModelForCausalLM" if has_adapters(source) and not parsed.merged else "AutoModelForCausalLM"
    print(f"exported {source} to {parsed.folder}; load it with {loader}.from_pretrained('{parsed.folder}')")
    if parsed.push is None:
        return 0
    from megadistill.checkpoint.model_card import CARD, model_card

    (Path(parsed.folder) / CARD).write_text(model_card(source, parsed.push), encoding="utf-8")
    try:
        return _push(Path(parsed.folder), parsed)
    except CheckpointError as error:
        again = f"megadistill export {parsed.folder} --push {parsed.push}"
        raise CheckpointError(f"{error}; {parsed.folder} is whole, and is pushed again with: {again}") from None


def _parser() -> Parser:
    parser = Parser(
        "export",
        "Writes the student of a checkpoint as a Hugging Face folder: weights, configuration, and tokenizer.\n"
        "With --push it goes to a hub as well, with a model card; the token is that of HF_TOKEN or of the login, the\n"
        "hub that of HF_ENDPOINT.",
        "examples:\n  megadistill export runs/demo exported/student\n"
        "  megadistill export runs/demo/checkpoints/step_100 exported/student --dtype bf16 --max-shard-size 2GB\n"
        "  megadistill export runs/demo exported/student --push OWNER/NAME --private\n"
        "  megadistill export exported/student --push OWNER/NAME      # a folder that was exported before",
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT",
        help="a step_N folder, or a run directory: its latest one; with --push alone an exported folder",
    )  # fmt: skip
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="where to write; must not exist or be empty")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="type of the weights; default: as trained")
    parser.add_argument(
        "--max-shard-size", type=size, metavar="SIZE", help="largest file, such as 500MB; default: 4GiB"
    )
    parser.add_argument(
        "--merged", action="store_true",
        help="of a run with model.student.lora: write the whole model, not the adapters alone",
    )  # fmt: skip
    parser.add_argument("--push", metavar="OWNER/NAME", help="repository of a hub to upload to; made if there is none")
    parser.add_argument("--private", action="store_true", help="a repository that is made is private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to upload to; default: the main one")
    return parser


def _check(parsed: argparse.Namespace) -> None:
    if parsed.push is None and (parsed.private or parsed.revision is not None):
        raise ConfigError(f"{'--private' if parsed.private else '--revision'} is about --push, which is not given")
    if parsed.folder is not None:
        return
    if parsed.push is None:
        raise ConfigError("FOLDER is missing: where to write")
    if parsed.dtype is not None or parsed.max_shard_size is not None or parsed.merged:
        raise ConfigError(
            "--dtype, --max-shard-size and --merged are of an export, and FOLDER, where to write it, is missing"
        )
    if not (Path(parsed.checkpoint) / "config.json").is_file():
        raise ConfigError(f"{parsed.checkpoint} is no exported folder; give FOLDER, where to export it to")


def _check_whole(parsed: argparse.Namespace) -> None:
    """Adapters name the folder of their base on this machine, so they are no model for others."""
    from megadistill.checkpoint.model_folder import model_folder
    from megadistill.models.folder_checks import ADAPTER_BASE

    if not parsed.merged and (Path(model_folder(parsed.checkpoint)) / ADAPTER_BASE).is_file():
        raise ConfigError(
            f"--push: {parsed.checkpoint} holds adapters of a base on this machine; push the whole model: "
            f"megadistill export {parsed.checkpoint} FOLDER --merged --push {parsed.push}"
        )


def _push(folder: Path, parsed: argparse.Namespace) -> int:
    from megadistill.checkpoint.push import push_folder

    print(f"pushed to {push_folder(folder, parsed.push, private=parsed.private, revision=parsed.revision)}")
    return 0
