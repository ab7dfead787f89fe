"""Logs, metrics, progress bars, timers and plots of a run."""

from megadistill.observability.log import get_logger
from megadistill.observability.memory import peak_bytes, reset_peak
from megadistill.observability.metrics import JsonLines, MetricsWriter
from megadistill.observability.progress import progress_bar
from megadistill.observability.timers import Timers

__all__ = [
    "JsonLines",
    "MetricsWriter",
    "Timers",
    "get_logger",
    "peak_bytes",
    "progress_bar",
    "reset_peak",
]
