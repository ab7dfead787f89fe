"""The command line: ``megadistill VERB ...``. Verbs are imported when they are used, so that ``--help`` is quick."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Sequence

from megadistill.cli.settings import line_of
from megadistill.errors import MegadistillError
from megadistill.files import did_you_mean, reason_of
from megadistill.observability.redact import keep_secrets, redact

VERBS = {
    "prepare": "turn instruction data into checked train and validation files",
    "train": "distil a teacher into a student (what launchers/run.sh starts)",
    "generate": "write responses to a file of prompts",
    "evaluate": "score models on evaluation sets",
    "export": "write a checkpoint's student as a Hugging Face folder",
    "inspect": "say what a checkpoint, a model folder or a run holds, and whether it is whole",
    "reshard": "cut a checkpoint for another number of processes",
    "shard": "cut a Hugging Face model into a file for each rank, for fast starts",
    "verify": "prove that two models say the same, by KL and by greedy tokens",
    "merge": "merge a LoRA adapter into its base model",
    "demo": "run the whole job on the built-in corpus and show the result",
    "study": "repeat the demo over seeds, against SFT of as many updates and as much time",
}
# Verbs that stand above this package.
_MODULES = {"demo": "megadistill.demo.run", "study": "megadistill.demo.study"}
_OTHER_RANKS_WAIT_S = 5.0
# Of launchers, and of what starts ranks without setting RANK: srun, Open MPI, MPICH.
_RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
INTERRUPTED = 130  # as shells say it: 128 + SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code: 0, 2 with one line on standard error for what a user can cause, 130 when
    interrupted. What else goes wrong is raised."""
    keep_secrets()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        _report(f"unknown verb '{verb}'; allowed: {', '.join(VERBS)}{did_you_mean(verb, VERBS)}")
        return 2
    try:
        return importlib.import_module(_MODULES.get(verb, f"megadistill.cli.{verb}")).run(rest)
    except MegadistillError as error:
        _report(line_of(error, verb))
        return error.exit_code
    except KeyboardInterrupt:
        _report("interrupted; the same command goes on with what is saved")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # A file or folder that cannot be read or written; an OSError without a name is a fault of ours.
        if error.filename is None:
            raise
        _report(f"{error.filename}: {reason_of(error)}")
        return MegadistillError.exit_code


def _report(message: str) -> None:
    """One line. Ranks but the first wait before theirs: what all ranks meet is said once, because a launcher ends the
    others when one leaves; what only this rank meets is said by it."""
    rank = int(next((os.environ[name] for name in _RANKS if name in os.environ), "0"))
    if rank:
        time.sleep(_OTHER_RANKS_WAIT_S)
    where = f" [rank {rank}]" if rank else ""
    print(f"megadistill{where}: {' '.join(redact(message).split())}", file=sys.stderr, flush=True)


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())
    return (
        "usage: megadistill VERB ...\n\nDistils large language models on DeepSpeed ZeRO-3 and tensor parallelism.\n\n"
        f"{verbs}\n\nmegadistill VERB --help tells more."
    )


def entry() -> None:
    """Console entry point."""
    sys.exit(main())
