"""Peak memory of this process."""

import sys
from typing import Any


def peak_bytes(device: Any = "cpu") -> int:
    """Peak memory in bytes: what torch allocated on a CUDA device since ``reset_peak``, else resident memory."""
    if _is_cuda(device):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak(device: Any = "cpu") -> None:
    """Resets the peak of a CUDA device; the operating system's peak of a process cannot be reset."""
    if _is_cuda(device):
        import torch

        torch.cuda.reset_peak_memory_stats(device)


def _is_cuda(device: Any) -> bool:
    return str(device).partition(":")[0] == "cuda"
