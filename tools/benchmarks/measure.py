"""What benchmarks share: time and peak memory of one call, the machine, options, and files of results."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megadistill.errors import ConfigError, first_line


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """CPU seconds of this process, or seconds between CUDA events."""
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3
    begin = time.process_time()
    call()
    return time.process_time() - begin


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds that go on counting: CPU seconds of this process, on CUDA those of the wall once the device is idle."""
    if device.type != "cuda":
        return time.process_time

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def find_device(name: str) -> torch.device:
    """Of ``--device``. Raises ConfigError where there is no such device."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: {first_line(error)}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: this machine has no CUDA device; allowed here: cpu")
    return device


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Peak memory above that at the start of the call: the allocator's on CUDA, else the resident memory's."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - base
    trim()
    base = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # sets the high-water mark back
    call()
    return _status("VmHWM") - base


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on, without names of hosts or paths."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    found: dict[str, Any] = {
        "cpu": cpu or platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def at_least(least: int) -> Callable[[str], int]:
    """A converter for argparse to a whole number >= ``least``."""

    def number(text: str) -> int:
        found = int(text) if text.isdecimal() else least - 1
        if found < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= {least}")
        return found

    return number


def save(output: Path, record: dict[str, Any], table: str) -> None:
    """The numbers as JSON, and the table beside them as .md."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(table + "\n", encoding="utf-8")


def trim() -> None:
    """Returns freed memory to the system, so that the call cannot use it unnoticed."""
    import ctypes

    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:  # not glibc
        return


def _status(name: str) -> int:
    return next(int(line.split()[1]) for line in _lines("/proc/self/status") if line.startswith(name + ":")) * 1024


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()
