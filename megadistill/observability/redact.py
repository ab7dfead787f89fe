"""Keeps secrets out of logs, warnings and tracebacks."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import traceback
import warnings
from contextlib import suppress
from types import TracebackType
from typing import Any
from urllib.parse import quote

HIDDEN = "***"
_SECRET_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS)$", re.IGNORECASE)
_plain_warning = warnings.formatwarning
_MIN_CHARS = 8  # shorter values are words that occur everywhere
# A URL's user information: up to the last @ before the path, or, where a password has a bare slash, before white space.
_URL_USER = re.compile(r"(?<=://)(?:[^\s/?#\"']+|[^\s/@:\"']*:[^\s@\"']*)@")


def redact(text: str) -> str:
    """``text`` with ``***`` in place of secrets.

    Secrets are the values of environment variables with names such as HF_TOKEN, and the user and password of URLs. A
    value is also found line by line, and as it is spelled inside a quoted string or a URL.
    """
    text = _URL_USER.sub(HIDDEN + "@", text)
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    return text


def holds_url_credentials(text: str) -> bool:
    """Whether ``text`` has a URL with a user or password."""
    return _URL_USER.search(text) is not None


def _secrets() -> list[str]:
    """All spellings, the longest first: a secret may be part of another one."""
    values = [value for name, value in os.environ.items() if _SECRET_NAME.search(name)]
    lines = {part.strip() for value in values for part in (value, *value.splitlines())}
    spellings = {text for line in lines for text in (line, repr(line)[1:-1], quote(line, safe=""))}
    return sorted((secret for secret in spellings if len(secret) >= _MIN_CHARS), key=len, reverse=True)


def keep_secrets() -> None:
    """Redacts this process's tracebacks (also of threads), warnings and log records from now on.

    Log records of libraries too: huggingface_hub logs the addresses that it cannot reach.
    """
    sys.excepthook = _print_redacted
    threading.excepthook = _print_of_thread
    warnings.formatwarning = _format_warning
    logging.setLogRecordFactory(_redacted_record)


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """One line: the source line that warned would tell a user nothing."""
    return redact(_plain_warning(message, category, filename, lineno, line=""))


def _redacted_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    record = logging.LogRecord(*args, **kwargs)
    with suppress(TypeError, ValueError):  # a wrong format string: the handler reports it
        record.msg, record.args = redact(record.getMessage()), ()
    if record.exc_info:
        record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
    return record


def _print_of_thread(failure: threading.ExceptHookArgs) -> None:
    if failure.exc_type is not SystemExit and failure.exc_value is not None:
        _print_redacted(failure.exc_type, failure.exc_value, failure.exc_traceback)


def _print_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)
