"""The command line: ``megadistill VERB ...``. Verbs are imported when they are used, so that ``--help`` is quick."""

from __future__ import annotations

import importlib
import io
import os
import sys
import time
from collections.abc import Sequence

from megadistill import __version__
from megadistill.cli.settings import line_of
from megadistill.errors import ExitCode, MegadistillError
from megadistill.files import did_you_mean, reason_of
from megadistill.launch.launchers import rank_of
from megadistill.observability.log import printable
from megadistill.observability.redact import keep_secrets, redact

VERBS = {
    "doctor": "examine a machine or an allocation before a run: ranks, links, memory, disk, models",
    "prepare": "turn instruction data into checked train and validation files",
    "config": "write a commented configuration file for two models, with sizes that fit",
    "plan": "predict memory, communication and time of a step, without a GPU",
    "train": "distill a teacher into a student (what launchers/run.sh starts)",
    "generate": "write responses to a file of prompts",
    "chat": "talk to a model: a look by hand",
    "compare": "show answers of several models side by side",
    "evaluate": "score models on evaluation sets",
    "plot": "draw the curves of runs",
    "export": "write a checkpoint's student as a Hugging Face folder",
    "inspect": "describe a checkpoint, a model folder or a run, and check that it is complete",
    "reshard": "convert a checkpoint for another number of processes",
    "shard": "split a Hugging Face model into one file for each rank, for fast starts",
    "verify": "check that two models agree, by KL and by greedy tokens",
    "merge": "merge a LoRA adapter into its base model",
    "demo": "run the whole job on the built-in corpus and show the result",
    "study": "repeat the demo over seeds, against SFT with as many updates and with as much time",
}
# Verbs of higher floors than this package's.
_MODULES = {"demo": "megadistill.demo.run", "study": "megadistill.demo.study"}
_OTHER_RANKS_WAIT_S = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
        argv: The verb and its arguments; those of the process by default.

    Returns:
        An exit code of ``ExitCode``. An error that the user can fix is one line on standard error; every other one is
        raised.
    """
    keep_secrets()
    _speak_utf8()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            return _run(arguments)
        finally:
            # Now, where an error can still be told: the interpreter would only complain when it ends.
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has gone, as with ``| head``
        _stop_writing()
        return ExitCode.DONE
    except OSError as error:
        # A file or folder that cannot be read or written; an OSError without a name is a bug of ours.
        if error.filename is None:
            raise
        _print_error(f"{error.filename}: {reason_of(error)}")
        return ExitCode.USER_ERROR


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return ExitCode.DONE if arguments else ExitCode.USER_ERROR
    if arguments[0] == "--version":
        print(f"megadistill {__version__}")
        return ExitCode.DONE
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        _print_error(f"unknown verb '{verb}'; allowed: {', '.join(VERBS)}{did_you_mean(verb, VERBS)}")
        return ExitCode.USER_ERROR
    try:
        code: int = importlib.import_module(_MODULES.get(verb, f"megadistill.cli.{verb}")).run(rest)
        return code
    except MegadistillError as error:
        _print_error(line_of(error, verb))
        return error.exit_code
    except KeyboardInterrupt:
        _print_error("interrupted; rerun the same command to resume from what is saved")
        return ExitCode.INTERRUPTED


def _speak_utf8() -> None:
    """Rows and messages are UTF-8 in every locale; a lone surrogate is written as its escape, as in JSON."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _stop_writing() -> None:
    """The interpreter flushes standard output again when it ends, and would complain again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_error(message: str) -> None:
    """Prints one line, on ranks other than 0 after a while.

    An error of all ranks is thus printed once, because a launcher ends the others when one has ended; an error of one
    rank is still printed.
    """
    rank = rank_of(os.environ)
    if rank:
        time.sleep(_OTHER_RANKS_WAIT_S)
    where = f" [rank {rank}]" if rank else ""
    print(f"megadistill{where}: {printable(' '.join(redact(message).split()))}", file=sys.stderr, flush=True)


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())
    return (
        "usage: megadistill VERB ...\n\nDistills large language models on DeepSpeed ZeRO-3 and tensor parallelism.\n\n"
        f"{verbs}\n\nmegadistill VERB --help describes a verb; megadistill --version tells the version."
    )


def entry() -> None:
    """Console entry point."""
    sys.exit(main())
