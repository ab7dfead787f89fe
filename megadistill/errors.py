"""The errors that a user can cause, and the exit codes of a process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum


class ExitCode(IntEnum):
    """Every exit code that a process of the project ends with on purpose. ``meaning`` is what the docs say about it."""

    meaning: str

    def __new__(cls, value: int, meaning: str) -> ExitCode:  # noqa: D102
        member = int.__new__(cls, value)
        member._value_, member.meaning = value, meaning
        return member

    DONE = 0, "done"
    USER_ERROR = 2, "an error that the user can fix; one line describes it"
    STOPPED = 85, "stopped by a signal, with a checkpoint: rerun the same command to resume"
    ORPHANED = 86, "the launcher died, and the step could not be finished within `train.stop_grace_s`"
    LOST_RANKS = 87, "another rank died or did not answer within `parallel.timeout_s`; one line names it"
    INTERRUPTED = 130, "Ctrl-C outside of training"  # as shells report it: 128 + SIGINT


def settings_of(*settings: str | None) -> str | None:
    """Several settings as an error carries them; None where all are None."""
    return ", ".join(setting for setting in settings if setting is not None) or None


class MegadistillError(Exception):
    """Base of the errors that carry one clear line: what is wrong, where, what is allowed, the nearest valid choice.

    Args:
        message: The line.
        setting: The dotted configuration key that the error is about (several: "a.b, c.d"). Only the command line
            turns it into words, because each verb has other names for it; ``str(error)`` does not contain it.
    """

    exit_code = ExitCode.USER_ERROR

    def __init__(self, message: str = "", *, setting: str | None = None) -> None:
        super().__init__(message)
        self.setting = setting


class ConfigError(MegadistillError):
    """A wrong key, type, value or combination in a configuration file or on the command line."""


class TopologyError(MegadistillError):
    """Processes, tensor-parallel size, heads and batch sizes that do not fit together."""


class DataError(MegadistillError):
    """A data file, a row, a tokenizer or an evaluation set that cannot be used."""


class CheckpointError(MegadistillError):
    """A checkpoint or a run directory that is missing, broken, or belongs to another run."""


class DivergenceError(MegadistillError):
    """A loss, gradient or logit that is not finite: nothing after it would mean anything."""


def first_line(error: Exception) -> str:
    """The first line of an exception's message, with the one that it announces; its type where there is no message."""
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {others[0].strip()}" if others and first.endswith(":") else first


@contextmanager
def needs_extra(extra: str, feature: str, *, setting: str | None = None) -> Iterator[None]:
    """Goes around the import of a package that one feature alone needs.

    Args:
        extra: The extra of setup.py that installs the package.
        feature: What the user asked for; begins the message.
        setting: As of MegadistillError.

    Raises:
        ConfigError: The package is not installed. The line has the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise ConfigError(
            f"{feature}: the package {package} is not installed; install it with: pip install 'megadistill[{extra}]'",
            setting=setting,
        ) from None
