"""What a user can cause: the command line prints the message as one line and exits with `exit_code`."""

from collections.abc import Iterator
from contextlib import contextmanager


class MegadistillError(Exception):
    """Base of the errors that carry one clear line: what is wrong, where, what is allowed, the nearest valid choice."""

    exit_code = 2


class ConfigError(MegadistillError):
    """A wrong key, type, value or combination in a configuration file or on the command line."""


class TopologyError(MegadistillError):
    """Processes, tensor-parallel size, heads and batch sizes that do not fit together."""


class DataError(MegadistillError):
    """A data file, a row, a tokenizer or an evaluation set that cannot be used."""


class CheckpointError(MegadistillError):
    """A checkpoint or a run directory that is missing, broken, or belongs to another run."""


class DivergenceError(MegadistillError):
    """A loss or gradient that is not finite: nothing after it would mean anything."""


def first_line(error: Exception) -> str:
    """What an exception says, its first line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def needs_extra(extra: str, feature: str) -> Iterator[None]:
    """Goes around the import of a package that one feature alone needs.

    Args:
        extra: The extra of setup.py that installs the package.
        feature: What the user asked for; begins the message.

    Raises:
        ConfigError: The package is not installed. The line has the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise ConfigError(
            f"{feature}: the package {package} is not installed; install it with: pip install 'megadistill[{extra}]'"
        ) from None
