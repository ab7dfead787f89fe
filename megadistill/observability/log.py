"""Log lines of rank 0: ``HH:MM:SS LEVEL component: message``, without secrets."""

import logging
import sys

from megadistill.observability.redact import redact

_ROOT = "megadistill"
_FORMAT = "%(asctime)s %(levelname)s %(component)s: %(message)s"


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        record.component = record.name.rpartition(".")[2]
        return super().format(record)


class _BesideBars(logging.Handler):
    """Prints to standard output without cutting through a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        try:
            tqdm.write(redact(self.format(record)), file=sys.stdout)
            sys.stdout.flush()
        except Exception:
            self.handleError(record)


def get_logger(rank: int = 0, component: str = _ROOT) -> logging.Logger:
    """The logger of a component.

    Args:
        rank: Rank 0 prints INFO and above to standard output; every other rank prints nothing.
        component: The part of the program that a line comes from, such as "train" or "checkpoint".
    """
    if rank != 0:
        silent = logging.getLogger(f"{_ROOT}.silent")
        silent.disabled = True
        return silent
    root = logging.getLogger(_ROOT)
    if not root.handlers:
        handler = _BesideBars()
        handler.setFormatter(_Lines(_FORMAT, datefmt="%H:%M:%S"))
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        # DeepSpeed and others put handlers on Python's root logger, which would print every line twice.
        root.propagate = False
    return root if component == _ROOT else root.getChild(component)
