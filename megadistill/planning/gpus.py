"""GPUs by name, and rates that were not measured on one. No torch: ``plan --help`` lists them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU in a usual machine with eight of them, or a core of a CPU.

    Attributes:
        name: What ``--gpu`` calls it.
        memory: Bytes.
        bf16: Dense bf16 peak in FLOP/s.
        fp32: float32 peak in FLOP/s, without TF32.
        bandwidth: Of its memory, in bytes/s.
        link: To the other GPUs of the machine, in bytes/s and direction.
        network: To other machines, in bytes/s and direction for each GPU.
    """

    name: str
    memory: int
    bf16: float
    fp32: float
    bandwidth: float
    link: float
    network: float


# Vendor's data sheets: NVIDIA A100 (2021), H100 (2023, SXM5), H200 (2024), B200 (DGX B200, 2025) and L40S (2023), dense
# rates. Links are half of the "total bandwidth" there: NVLink 3, 4, 4, 5; the L40S has PCIe 4.0 x16 alone. Network: one
# adapter for each GPU as in DGX machines (200 Gbit/s beside A100, 400 beside the others); the L40S shares one of 100.
_PRESETS = (
    Gpu("A100-40", 40_000_000_000, 312e12, 19.5e12, 1.555e12, 300e9, 25e9),
    Gpu("A100-80", 80_000_000_000, 312e12, 19.5e12, 2.039e12, 300e9, 25e9),
    Gpu("H100-80", 80_000_000_000, 989e12, 67e12, 3.35e12, 450e9, 50e9),
    Gpu("H200-141", 141_000_000_000, 989e12, 67e12, 4.8e12, 450e9, 50e9),
    Gpu("B200-180", 180_000_000_000, 2250e12, 80e12, 8.0e12, 900e9, 50e9),
    Gpu("L40S-48", 48_000_000_000, 362e12, 91.6e12, 0.864e12, 32e9, 12.5e9),
)
GPUS: Mapping[str, Gpu] = {gpu.name: gpu for gpu in _PRESETS}

# One core of a server with AVX-512 that runs one of the processes, which meet over gloo. Its memory is the machine's.
CPU_CORE = Gpu("CPU core", 0, 60e9, 120e9, 8e9, 1.5e9, 1e9)

# [est]: not yet measured on a GPU.
MFU = 0.40  # share of the peak that products reach
LINK_SHARE, NETWORK_SHARE = 0.7, 0.8  # shares of the links that collectives reach
LAUNCH_S, RECORDED_LAUNCH_S = 6.5e-6, 2.0e-6  # of an operation from Python, and within a CUDA graph
COLLECTIVE_S = 14e-6  # of a small collective


def total_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
