"""Log lines of rank 0: ``HH:MM:SS LEVEL component: message``, without secrets and control characters."""

import logging
import re
import sys

from megadistill.observability.redact import redact

_ROOT = "megadistill"
_FORMAT = "%(asctime)s %(levelname)s %(component)s: %(message)s"

# What a terminal would obey instead of showing it (all controls but tab and line feed; directions), lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_ESCAPED_BYTES = re.compile("[\udc80-\udcff]+")


def printable(text: str) -> str:
    """``text`` for a terminal: control characters and lone surrogates, of a file or an argument, as their escapes.

    The bytes that Python could not decode in the locale's encoding (a file name) are shown as UTF-8 where they are.
    """
    text = _ESCAPED_BYTES.sub(
        lambda found: found[0].encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape"), text
    )
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        record.component = record.name.rpartition(".")[2]
        return super().format(record)


class _BesideBars(logging.Handler):
    """Prints to standard output without cutting through a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        try:
            tqdm.write(printable(redact(self.format(record))), file=sys.stdout)
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
