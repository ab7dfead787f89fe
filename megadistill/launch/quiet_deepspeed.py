"""DeepSpeed's per-node launcher without its messages: ``launchers/run.sh`` starts it on a single machine.

They go to RUN/launcher.log, where an end without an exit code of ours points to.

    python -m megadistill.launch.quiet_deepspeed PROCESSES PORT launchers/run.sh --config FILE [section.field=value ...]
"""

from __future__ import annotations

import base64
import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megadistill.config.load import load_config
from megadistill.config.shipped import find_config
from megadistill.errors import CheckpointError, ConfigError, ExitCode, MegadistillError
from megadistill.files import os_errors_as
from megadistill.observability.redact import keep_secrets, redact

LOG = "launcher.log"
_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def main(words: Sequence[str]) -> int:
    """Starts the ranks and waits for them; returns the exit code of the first one that failed.

    Args:
        words: Number of processes ("gpus": one for each), port, program, its arguments.
    """
    keep_secrets()
    processes, port, program, *arguments = words
    log_file: Path | None = None
    handler: logging.Handler | None = None
    try:
        with suppress(OSError):  # the ranks say what is wrong with the folder
            log_file = _log_file(arguments)
        if log_file is not None:
            with os_errors_as(CheckpointError, log_file):
                handler = logging.FileHandler(log_file, encoding="utf-8")
        import torch

        devices = _devices(processes, torch.cuda.device_count())
    except MegadistillError as error:
        print(f"megadistill: {redact(str(error))}", file=sys.stderr, flush=True)
        return ExitCode.USER_ERROR
    from megadistill.launch.world import name_accelerator

    name_accelerator()  # before the next import, which speaks already
    from deepspeed.launcher import launch
    from deepspeed.utils import logger

    if handler is not None:
        handler.setFormatter(logging.Formatter(_FORMAT))
        logger.handlers = [handler]
    places = json.dumps({"localhost": devices}).encode()
    level = "error" if log_file is None else "info"
    sys.argv = [
        "deepspeed", f"--world_info={base64.urlsafe_b64encode(places).decode()}", "--master_addr=127.0.0.1",
        f"--master_port={port}", f"--log_level={level}", program, *arguments,
    ]  # fmt: skip
    try:
        launch.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        if log_file is not None and code not in set(ExitCode):
            killed = f" (signal {-code})" if code < 0 else ""
            print(
                f"megadistill: a process ended with {code}{killed}; the launcher's log is {log_file}", file=sys.stderr
            )
        return code
    return ExitCode.DONE


def _log_file(arguments: Sequence[str]) -> Path | None:
    """RUN/launcher.log, its folder made; None where the arguments name no configuration or the verb doctor.

    Raises:
        MegadistillError: The configuration is wrong: no process needs to be started to say so.
    """
    if arguments[:1] == ["doctor"]:
        return None  # it examines run.dir and makes nothing in it
    config, overrides, rest = None, [], list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--config" and rest:
            config = rest.pop(0)
        elif word.startswith("--config="):
            config = word.partition("=")[2]
        elif word.startswith("-"):
            return None
        else:
            overrides.append(word)
    if config is None:
        return None
    run_dir = Path(load_config(find_config(config), overrides).run.dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    return run_dir / LOG


def _devices(processes: str, num_gpus: int) -> list[int | str]:
    """What each process gets: the devices of CUDA_VISIBLE_DEVICES, else the first ones.

    Args:
        processes: Their number, or "gpus".
        num_gpus: GPUs that torch finds.

    Raises:
        ConfigError: The number is none, or larger than that of the GPUs of a machine that has some.
    """
    if processes == "gpus" and not num_gpus:
        raise ConfigError("torch finds no GPU here; NPROC=N starts N processes")
    if processes != "gpus" and not (processes.isdecimal() and int(processes) > 0):
        raise ConfigError(f"NPROC={processes} is no number of processes; it must be 1 or more")
    count = num_gpus if processes == "gpus" else int(processes)
    if 0 < num_gpus < count:
        raise ConfigError(f"NPROC={count}, but torch finds {num_gpus} GPUs here; every process needs one")
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if not num_gpus or len(visible) < count:
        return list(range(count))
    return [int(name) if name.isdigit() else name for name in visible[:count]]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
