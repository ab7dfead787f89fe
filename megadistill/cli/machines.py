"""The machines that a verb plans for."""

from __future__ import annotations

import argparse

from megadistill.cli.parsing import Parser, size, value_of
from megadistill.config.section import PositiveInt
from megadistill.errors import ConfigError
from megadistill.planning.gpus import CPU_CORE, GPUS, Gpu, total_memory

_DEFAULT_GPU = "H100-80"


def add_machines(parser: Parser) -> None:
    """Adds ``--nodes``, ``--gpus-per-node``, ``--gpu``, ``--cpu`` and ``--gpu-memory``."""
    number = value_of(PositiveInt)
    parser.add_argument("--nodes", type=number, default=1, metavar="N", help="machines; default: 1")
    parser.add_argument("--gpus-per-node", type=number, default=8, metavar="G", help="GPUs of each; default: 8")
    parser.add_argument("--gpu", choices=tuple(GPUS), help=f"speed and memory; default: {_DEFAULT_GPU}")
    parser.add_argument(
        "--cpu", action="store_true", help="plan processes that compute on CPU cores, --gpus-per-node on each machine"
    )
    parser.add_argument(
        "--gpu-memory", type=_memory, metavar="SIZE",
        help="such as 80GB; default: that of --gpu, with --cpu a process's share of this machine's",
    )  # fmt: skip


def _memory(text: str) -> int:
    """Converts a size with its unit to bytes, for argparse."""
    if text.strip().replace(".", "", 1).isdecimal():
        raise argparse.ArgumentTypeError(f"{text} has no unit; allowed: such as 80GB")
    return size(text)


def gpu_of(parsed: argparse.Namespace) -> Gpu:
    """The GPU, or a core of a CPU. Raises ConfigError where both are given."""
    if parsed.cpu and parsed.gpu is not None:
        raise ConfigError(f"--cpu plans without GPUs: leave out --gpu {parsed.gpu}, or --cpu")
    return CPU_CORE if parsed.cpu else GPUS[parsed.gpu or _DEFAULT_GPU]


def memory_of(parsed: argparse.Namespace) -> int:
    """Bytes of a GPU, or of a process on a CPU."""
    return int(parsed.gpu_memory or gpu_of(parsed).memory or total_memory() // parsed.gpus_per_node)
