"""Log lines from one rank, without secrets."""

import logging
import sys

from megadistill.observability.redact import redact

_FORMAT = "%(asctime)s %(message)s"


class _BesideBars(logging.Handler):
    """Prints to standard output without cutting through a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        try:
            tqdm.write(redact(self.format(record)), file=sys.stdout)
            sys.stdout.flush()
        except Exception:
            self.handleError(record)


def get_logger(rank: int = 0) -> logging.Logger:
    """The project's logger: rank 0 prints INFO and up to standard output, every other rank prints nothing."""
    if rank != 0:
        silent = logging.getLogger("megadistill.silent")
        silent.disabled = True
        return silent
    logger = logging.getLogger("megadistill")
    if not logger.handlers:
        handler = _BesideBars()
        handler.setFormatter(logging.Formatter(_FORMAT, datefmt="%H:%M:%S"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        # DeepSpeed and others put handlers on the root logger, which would print every line twice.
        logger.propagate = False
    return logger
