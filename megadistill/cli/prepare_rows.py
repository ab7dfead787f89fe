"""``megadistill prepare --config``: tokenizes the rows of a run ahead, with all cores of a machine or under mpirun."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadistill.cli.parsing import Parser, config_of, refuse_unwritable, value_of
from megadistill.config.load import load_config
from megadistill.config.section import PositiveInt
from megadistill.config.shipped import find_config
from megadistill.errors import ConfigError, ExitCode, MegadistillError
from megadistill.launch.launchers import is_mpi_rank, rank_of
from megadistill.observability.log import get_logger
from megadistill.observability.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megadistill.config.schema import RunConfig
    from megadistill.data.row_parts import Watch
    from megadistill.launch.stopping import StopRequest

# The options that tell this form of the verb from the other.
OPTIONS = ("--config", "--rows")
# How long helpers are waited for, after the work and after an error; then they are killed, which leaves their finished
# parts.
_STOP_S, _ABORT_S = 30.0, 5.0


def parser_of() -> Parser:
    """All arguments of this form of the verb."""
    parser = Parser(
        "prepare",
        "Tokenizes the rows of a run (data.train_path, prompts_path, valid_path) into data.cache_dir, where the run\n"
        "finds them. What is there already is kept: after an interruption, the same command makes the rest.\n"
        "Under mpirun (with mpi4py) the ranks share the work; the files are the same for any number of processes.",
        "examples:\n"
        "  megadistill prepare --config my.yaml data.cache_dir=/scratch/rows\n"
        "  megadistill prepare --rows a.jsonl b.jsonl --tokenizer MODEL_FOLDER --cache-dir /scratch/rows\n"
        "  mpirun -n 8 python tools/prepare_data.py --config my.yaml data.cache_dir=/scratch/rows",
    )
    parser.add_config(required=False)
    parser.add_argument("--rows", nargs="+", metavar="SOURCE", help="in place of --config: files, folders or hub names")
    parser.add_argument("--tokenizer", metavar="MODEL", help="for --rows: model folder or hub name")
    parser.add_argument("--cache-dir", metavar="FOLDER", help="for --rows: where prepared rows go")
    parser.add_argument(
        "--workers", type=value_of(PositiveInt), metavar="N",
        help="processes that share the work; default: the number of cores, and one under mpirun",
    )  # fmt: skip
    return parser


def run(arguments: Sequence[str]) -> int:
    """Runs this form of the verb in one process of perhaps several; returns its exit code."""
    parsed = parser_of().parse(arguments)
    is_rank = is_mpi_rank(os.environ)
    if is_rank and parsed.workers is not None:
        raise ConfigError("--workers is for one machine without mpirun: here, mpirun -n N says how many share the work")
    # The processes are the parallelism; threads of the tokenizer would not survive the forks.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from megadistill.launch.stopping import stop_requests

    with stop_requests() as request:
        jobs, tokenizer = _jobs(parsed)
        workers = 1 if is_rank else parsed.workers or len(os.sched_getaffinity(0))
        return _prepare(jobs, tokenizer, workers, request)


def _jobs(parsed: Any) -> tuple[list[tuple[RunConfig, Mapping[str, str]]], PreTrainedTokenizerBase]:
    """What is to be prepared, each with its settings, and the tokenizer."""
    from megadistill.training.data import row_paths

    if (parsed.config is None) == (parsed.rows is None):
        raise ConfigError("megadistill prepare: either --config FILE or --rows SOURCE ... is needed")
    if parsed.config is not None:
        for option in ("tokenizer", "cache_dir"):
            if getattr(parsed, option) is not None:
                name = option.replace("_", "-")
                raise ConfigError(f"megadistill prepare: --{name} is for --rows; the configuration has its own")
        config = config_of(parsed)
        if config.data.cache_dir is None:
            raise ConfigError("data.cache_dir is missing: the folder where prepared rows go", setting="data.cache_dir")
        if not (paths := row_paths(config)):
            raise ConfigError("data.train_path is missing: there are no rows to prepare", setting="data.train_path")
        refuse_unwritable(config.data.cache_dir, is_file=False)
        from megadistill.training.setup import run_tokenizer

        return [(config, paths)], run_tokenizer(config)[0]
    if parsed.tokenizer is None or parsed.cache_dir is None:
        raise ConfigError("megadistill prepare: --rows needs --tokenizer MODEL and --cache-dir FOLDER")
    if other := [each for each in parsed.overrides if not each.startswith("data.")]:
        raise ConfigError(
            f"megadistill prepare: with --rows only settings of the section data have an effect: {other[0]}"
        )
    refuse_unwritable(parsed.cache_dir, is_file=False)
    from megadistill.checkpoint.model_folder import model_folder
    from megadistill.data.tokenize import load_tokenizer

    models = [f"model.{role}.path={parsed.tokenizer}" for role in ("student", "teacher")]
    fixed = ["run.dir=unused", *models, "train.eval_every=0", f"data.cache_dir={parsed.cache_dir}"]
    base = find_config("configs/base.yaml")
    configs = [load_config(base, [*fixed, f"data.train_path={path}", *parsed.overrides]) for path in parsed.rows]
    return [(config, row_paths(config)) for config in configs], load_tokenizer(model_folder(parsed.tokenizer))


def _prepare(
    jobs: Sequence[tuple[RunConfig, Mapping[str, str]]],
    tokenizer: PreTrainedTokenizerBase,
    workers: int,
    request: StopRequest,
) -> int:
    from megadistill.data.row_sources import RowSource
    from megadistill.data.row_store import PreparationStopped, RowStore

    log = get_logger(rank_of(os.environ), "prepare")
    try:
        for config, paths in jobs:
            for path in paths.values():
                RowSource(path, config.data)  # what cannot be read is said before any process is forked
            with _helpers(config, paths, tokenizer, workers - 1, request) as errors, _bar(request, errors) as watch:
                template, sets = RowStore(config.data, tokenizer, watch).prepared(paths)
            for prepared in sets.values():
                left_out = ", ".join(f"{count} {what}" for what, count in prepared.counts.items() if count)
                log.info(
                    f"{prepared.description}; template {template}: {len(prepared.rows)} rows prepared"
                    + (f" ({left_out})" if left_out else "")
                )
    except PreparationStopped:
        log.warning(
            f"stopped by {signal.Signals(request.signal).name}; rerun the same command: finished parts are kept"
        )
        return ExitCode.STOPPED
    return ExitCode.DONE


@contextmanager
def _helpers(
    config: RunConfig, paths: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, number: int, request: StopRequest
) -> Iterator[Connection]:
    """Forks processes that make parts, too; yields where their errors come from."""
    fork = multiprocessing.get_context("fork")
    errors, sender = fork.Pipe(duplex=False)
    parent = os.getpid()
    helpers = [
        fork.Process(target=_help, args=(config, paths, tokenizer, request, sender, parent)) for _ in range(number)
    ]
    for helper in helpers:
        helper.start()
    is_done = False
    try:
        yield errors
        is_done = True
    finally:
        deadline = time.monotonic() + (_STOP_S if is_done else _ABORT_S)
        for helper in helpers:
            if not is_done:
                helper.terminate()
        for helper in helpers:
            helper.join(max(0.0, deadline - time.monotonic()))
            if helper.is_alive():
                helper.kill()
                helper.join()


def _help(
    config: RunConfig,
    paths: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
    request: StopRequest,
    sender: Connection,
    parent: int,
) -> None:
    """A forked process: makes parts until the sets are complete."""
    from megadistill.data.row_store import PreparationStopped, RowStore

    def watch(path: str, done: int, total: int | None) -> None:
        if request.signal or os.getppid() != parent:
            raise PreparationStopped

    with suppress(PreparationStopped):
        try:
            RowStore(config.data, tokenizer, watch).prepared(paths)
        except MegadistillError as error:
            sender.send(error)


@contextmanager
def _bar(request: StopRequest, errors: Connection) -> Iterator[Watch]:
    """A progress bar for each source; ends the work at a signal, and at an error of a helper, which it raises."""
    from megadistill.data.row_store import PreparationStopped

    bars: dict[str, Any] = {}
    starts: dict[str, tuple[int, float]] = {}  # rows that were there, and when
    rank = rank_of(os.environ)

    def watch(path: str, done: int, total: int | None) -> None:
        if errors.poll():
            raise errors.recv()
        if request.signal:
            raise PreparationStopped
        if path not in bars:
            name = f"preparing {Path(path).name}"
            starts[path] = done, time.monotonic()
            bars[path] = progress_bar(description=name, total=total, initial=done, unit="row", rank=rank)
        bar = bars[path]
        if done > bar.n:
            before, began = starts[path]
            rate = (done - before) / max(time.monotonic() - began, 1e-3)
            bar.set_postfix_str(f"{rate:,.0f} rows/s", refresh=False)
            bar.update(done - bar.n)

    try:
        yield watch
    finally:
        for bar in bars.values():
            bar.close()
