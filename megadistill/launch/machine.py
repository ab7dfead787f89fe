"""What a process finds out about its machine without asking any other one: versions, memory, limits, its device."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch

from megadistill.observability.log import get_logger
from megadistill.parallel.context import ParallelContext

_PACKAGES = ("megadistill", "torch", "deepspeed", "transformers", "safetensors")
_PRODUCT, _SPEED_S = 256, 0.05


def versions(device: torch.device) -> dict[str, str]:
    """Versions that must be the same on all ranks; none of the packages is imported for it."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    if "megadistill" not in found:  # a clone that is not installed
        import megadistill

        found["megadistill"] = megadistill.__version__
    if device.type == "cuda":
        found |= {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
    return found


def facts_of(device: torch.device) -> dict[str, Any]:
    """This process's place, versions, and free memory, as plain JSON values. No communication, some milliseconds."""
    memory = psutil.virtual_memory()
    facts: dict[str, Any] = _brief(device) | {
        "pid": os.getpid(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "host_free": memory.available,
        "host_total": memory.total,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }
    if device.type == "cuda":
        facts["device_free"], facts["device_total"] = torch.cuda.mem_get_info(device)
        if (driver := _driver()) is not None:
            facts["versions"]["driver"] = driver
    return facts


def say_machines(context: ParallelContext) -> None:
    """Logs what a run runs on, and a warning of versions that are not the same on all ranks.

    Collective over the world: one object all-gather.
    """
    facts = dict(enumerate(context.gather_objects(_brief(context.device))))
    log = get_logger(context.rank, "train")
    log.info(summary(facts))
    for line in differing_versions({rank: found["versions"] for rank, found in facts.items()}):
        log.warning(f"{line}: ranks that run other code may compute other numbers, or wait for one another forever")


def _brief(device: torch.device) -> dict[str, Any]:
    """What costs nothing to know."""
    return {
        "host": platform.node(),
        "versions": versions(device),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def speed(device: torch.device) -> float:
    """FLOPs a second of small float32 products on this device: to compare ranks with one another, not with a paper."""
    matrix = torch.ones(_PRODUCT, _PRODUCT, device=device)
    _synchronize(device)
    count, begun, best = 0, time.perf_counter(), 0.0
    while time.perf_counter() - begun < _SPEED_S or count < 3:
        started = time.perf_counter()
        for _ in range(4):
            matrix @ matrix
        _synchronize(device)
        best = max(best, 4 / (time.perf_counter() - started))
        count += 1
    return best * 2 * _PRODUCT**3


def differing_versions(of_ranks: Mapping[int, Mapping[str, str]]) -> list[str]:
    """What differs: "torch is 2.12.0 on rank 3, 2.13.0 on the others"; the more frequent version is that of the others.

    Args:
        of_ranks: Rank -> its ``versions``.
    """
    lines = []
    names = dict.fromkeys(name for found in of_ranks.values() for name in found)
    for name in names:
        by_version: dict[str, list[int]] = {}
        for rank, found in sorted(of_ranks.items()):
            by_version.setdefault(found.get(name, "missing"), []).append(rank)
        if len(by_version) > 1:
            usual = max(by_version, key=lambda text: len(by_version[text]))
            odd = (f"{text} on {listed(ranks)}" for text, ranks in by_version.items() if text != usual)
            lines.append(f"{name} is {', '.join(odd)}, {usual} on the others")
    return lines


def summary(facts: Mapping[int, Mapping[str, Any]]) -> str:
    """One line about all processes: versions of rank 0, and how many processes run on what."""
    hosts = {found["host"] for found in facts.values()}
    devices = sorted({found["device"] for found in facts.values()})
    words = ", ".join(f"{name} {text}" for name, text in facts[min(facts)]["versions"].items())
    return f"{counted(len(facts), 'process')} on {counted(len(hosts), 'host')} ({', '.join(devices)}); {words}"


def slow_ranks(speeds: Mapping[int, float]) -> list[int]:
    """Ranks that compute at less than half of the median's speed."""
    usual = statistics.median(speeds.values())
    return [rank for rank, found in speeds.items() if found < usual / 2]


def counted(number: int, what: str) -> str:
    """A number with its noun: "1 host", "2 hosts", "2 processes"."""
    plural = "es" if what.endswith("s") else "s"
    return f"{number} {what}{'' if number == 1 else plural}"


def listed(ranks: Iterable[int]) -> str:
    """Names ranks: "rank 1", "ranks 1, 2, 3"; no more than six."""
    ranks = list(ranks)
    more = f" and {len(ranks) - 6} more" if len(ranks) > 6 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:6]))}{more}"


def _driver() -> str | None:
    """Version of the GPU driver; None where nvidia-smi does not tell it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() or None


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
