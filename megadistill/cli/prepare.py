"""``megadistill prepare``: checks, filters and splits an instruction data set."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from megadistill.cli import prepare_rows
from megadistill.cli.parsing import Parser, value_of
from megadistill.cli.settings import line_of
from megadistill.config.section import NonNegativeInt, PositiveInt
from megadistill.errors import DataError, ExitCode, MegadistillError, needs_extra
from megadistill.launch.launchers import is_mpi_rank
from megadistill.observability.progress import progress_bar
from megadistill.observability.redact import redact

if TYPE_CHECKING:
    from megadistill.data.convert import ConvertedShare, ConvertOptions


def parser_of() -> Parser:
    """All arguments of the verb."""
    positive, natural = value_of(PositiveInt), value_of(NonNegativeInt)
    parser = Parser(
        "prepare",
        "Checks, filters and splits instructions or chats into JSONL files that megadistill train reads, with a\n"
        "report. SOURCE is a JSONL, JSON, CSV, TSV (text also as .gz) or Parquet file, a folder of the library\n"
        "datasets or a hub name. Rows are recognized by their columns: instruction + input (or context) + output (or\n"
        "response), prompt + completion, messages, conversations, chosen.\n"
        "Under mpirun (with mpi4py) the ranks share the tokenization; the files are the same for any number of ranks.",
        "examples:\n"
        "  megadistill prepare SOURCE FOLDER --tokenizer MODEL_FOLDER --valid 400\n"
        "  mpirun -n 8 python tools/prepare_data.py SOURCE FOLDER --tokenizer MODEL_FOLDER\n\n"
        "with --config FILE or --rows SOURCE ..., it tokenizes the rows of a run ahead into data.cache_dir:\n"
        "  megadistill prepare --config FILE --help",
    )
    parser.add_argument("source", metavar="SOURCE", help="file, folder of the library datasets or hub name")
    parser.add_argument("folder", metavar="FOLDER", help="where train.jsonl, valid.jsonl and report.json go")
    parser.add_argument("--tokenizer", required=True, help="model folder or hub name; limits are in its tokens")
    parser.add_argument(
        "--valid", type=natural, default=0, metavar="N", help="rows set aside for validation; default: 0"
    )
    parser.add_template()
    parser.add_argument(
        "--max-prompt-tokens", type=positive, default=256, metavar="N", help="leave out longer prompts; default: 256"
    )
    parser.add_argument(
        "--max-tokens", type=positive, default=512, metavar="N", help="limit of prompt and response; default: 512"
    )
    parser.add_argument("--drop-long-responses", action="store_true", help="leave out rows over --max-tokens, too")
    parser.add_argument(
        "--min-reference-words", type=natural, default=0, metavar="N", help="leave out shorter references; default: 0"
    )
    parser.add_argument("--max-rows", type=positive, metavar="N", help="keep the first N rows that pass")
    parser.add_argument("--keep-duplicates", action="store_true", help="keep rows whose prompt was read before")
    parser.add_argument(
        "--skip-bad-rows", action="store_true", help="count and skip malformed rows instead of stopping"
    )
    parser.add_fields()
    parser.add_argument("--split", default="train", help="split of a folder or hub data set; default: train")
    parser.add_argument("--config-name", help="configuration of a hub data set")
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="draws the validation rows; default: 0")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an earlier run")
    return parser


def options_of(arguments: argparse.Namespace) -> ConvertOptions:
    """The arguments as ``megadistill.data.convert`` takes them."""
    from megadistill.data.columns import FieldNames
    from megadistill.data.convert import ConvertOptions
    from megadistill.data.prompts import PromptSettings

    return ConvertOptions(
        path=arguments.source,
        fields=FieldNames(arguments.instruction_field, arguments.input_field, arguments.output_field),
        split=arguments.split,
        config_name=arguments.config_name,
        skip_bad_rows=arguments.skip_bad_rows,
        prompts=PromptSettings(
            template=arguments.template,
            chat_template=arguments.chat_template,
            chat_template_kwargs=arguments.chat_template_kwargs,
            max_prompt_tokens=arguments.max_prompt_tokens,
            max_tokens=arguments.max_tokens,
        ),
        drop_long_responses=arguments.drop_long_responses,
        min_reference_words=arguments.min_reference_words,
        drop_duplicates=not arguments.keep_duplicates,
        max_rows=arguments.max_rows,
        num_valid=arguments.valid,
        seed=arguments.seed,
    )


def communicator() -> Any | None:
    """MPI's world where a launcher started this process, else None."""
    if not is_mpi_rank(os.environ):
        return None
    with needs_extra("mpi", "started by mpirun"):
        from mpi4py import MPI
    return MPI.COMM_WORLD


def run(arguments: Sequence[str]) -> int:
    """Runs the verb; returns its exit code."""
    if any(word.split("=")[0] in prepare_rows.OPTIONS for word in arguments):
        return _run_rows(arguments)
    parsed = parser_of().parse(arguments)
    from megadistill.data.encode import check_limits

    check_limits(parsed.max_prompt_tokens, parsed.max_tokens)  # before the tokenizer is loaded
    world = communicator()
    if world is None:
        return finish([check(parsed, 0, 1)], parsed)
    with _all_or_none(world):
        outcomes = world.gather(check(parsed, world.Get_rank(), world.Get_size()), root=0)
        code = finish_quietly(outcomes, parsed) if outcomes is not None else None
        return int(world.bcast(code, root=0))


def _run_rows(arguments: Sequence[str]) -> int:
    """The form that tokenizes ahead; under MPI with the same exit code on all ranks, and one line about an error."""
    world = communicator()
    if world is None:
        return prepare_rows.run(arguments)
    with _all_or_none(world):
        error: MegadistillError | None = None
        code = int(ExitCode.DONE)
        try:
            code = prepare_rows.run(arguments)
        except MegadistillError as caught:
            error, code = caught, int(caught.exit_code)
        outcomes = world.allgather((error, code))
        first = next((each for each, _ in outcomes if each is not None), None)
        if first is not None and world.Get_rank() == 0:
            print(f"megadistill: {redact(line_of(first, 'prepare'))}", file=sys.stderr)
        return int(first.exit_code) if first is not None else max(code for _, code in outcomes)


@contextmanager
def _all_or_none(world: Any) -> Iterator[None]:
    """A rank that fails for an unknown reason takes the others with it."""
    try:
        yield
    except Exception:
        print(redact(traceback.format_exc()), end="", file=sys.stderr)
        # A rank that ends with a traceback would leave the others waiting in the gather.
        world.Abort(1)
        raise


def check(parsed: argparse.Namespace, rank: int, size: int) -> ConvertedShare | MegadistillError:
    """This rank's share, or the error that stopped it, which goes to rank 0 like a result."""
    from megadistill.checkpoint.model_folder import model_folder
    from megadistill.data.convert import convert_share, taken_files
    from megadistill.data.tokenize import load_tokenizer

    try:
        if (taken := taken_files(parsed.folder)) and not parsed.overwrite:
            raise DataError(f"{parsed.folder} already has {', '.join(taken)}; choose another folder, or --overwrite")
        tokenizer = load_tokenizer(model_folder(parsed.tokenizer))
        bar = partial(progress_bar, description="checking rows", unit="row", rank=rank)
        return convert_share(options_of(parsed), tokenizer, share=rank, num_shares=size, progress=bar)
    except MegadistillError as error:
        return error


def finish(outcomes: Sequence[ConvertedShare | MegadistillError], parsed: argparse.Namespace) -> int:
    """Writes the files and prints the report; raises the first rank's error."""
    from megadistill.data.convert import long_response_warnings, report_text, write_converted

    shares = []
    for outcome in outcomes:
        if isinstance(outcome, MegadistillError):
            raise outcome
        shares.append(outcome)
    report = write_converted(shares, options_of(parsed), parsed.folder, overwrite=parsed.overwrite)
    print(report_text(report))
    for warning in long_response_warnings(report):
        print(f"WARNING: {warning} (--max-tokens; --drop-long-responses leaves them out)")
    return 0


def finish_quietly(outcomes: Sequence[ConvertedShare | MegadistillError], parsed: argparse.Namespace) -> int:
    """``finish`` on MPI's rank 0: an error is printed, and its exit code is returned for all ranks."""
    try:
        return finish(outcomes, parsed)
    except MegadistillError as error:
        print(f"megadistill: {redact(line_of(error, 'prepare'))}", file=sys.stderr)
        return error.exit_code
