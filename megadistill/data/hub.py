"""Names of models, tokenizers and data sets: local paths or hub names; and whether the hub can be reached."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import getproxies

from megadistill.config.model import REVISION_SIGN
from megadistill.errors import ConfigError, MegadistillError
from megadistill.files import did_you_mean_path

_FILE_SUFFIXES = frozenset(
    {".bin", ".csv", ".json", ".jsonl", ".parquet", ".pt", ".safetensors", ".tsv", ".txt", ".yaml", ".yml"}
)


def is_hub_name(name: str) -> bool:
    """Whether the name of a model, tokenizer or data set is a hub name.

    One rule for all of them: what exists is local; what is spelled as a path is local, too (it starts with ``.``, ``/``
    or ``~``, has more than one slash or a trailing one, or ends in a file suffix such as ``.json``); every other
    name, NAME or OWNER/NAME, is a hub name. A hub name may have a revision, NAME@REVISION.
    """
    bare, revision = split_revision(name)
    return not Path(bare).exists() and not _is_spelled_as_path(bare) and revision != ""


def split_revision(name: str) -> tuple[str, str | None]:
    """(NAME, REVISION) of NAME@REVISION, which may be a branch, a tag or a commit; what exists has no revision."""
    bare, sign, revision = name.partition(REVISION_SIGN)
    return (name, None) if not sign or Path(name).exists() else (bare, revision)


def at_revision(name: str, revision: str) -> str:
    """A hub name at another revision."""
    return split_revision(name)[0] + REVISION_SIGN + revision


def _is_spelled_as_path(name: str) -> bool:
    parts = Path(name).parts
    return (
        name.startswith((".", "/", "~"))
        or name.endswith("/")
        or len(parts) not in (1, 2)
        or ".." in parts
        or Path(name).suffix.lower() in _FILE_SUFFIXES
    )


def check_name(
    name: str, where: str = "", error: type[MegadistillError] = ConfigError, setting: str | None = None
) -> None:
    """Raises ``error`` for a path that does not exist; a hub name passes, without asking the hub.

    Args:
        name: A model, tokenizer or data set.
        where: What it was given as; begins the message.
        error: The error to raise.
        setting: The setting that the error is about.
    """
    if not Path(name).exists() and not is_hub_name(name):
        prefix = f"{where}: " if where else ""
        bare, revision = split_revision(name)
        if revision is not None and Path(bare).exists():
            raise error(
                f"{prefix}{name}: {bare} is local, and only names of the hub have revisions; leave out "
                f"{REVISION_SIGN}{revision}",
                setting=setting,
            )
        if revision == "":
            raise error(f"{prefix}{name}: a branch, tag or commit must follow the {REVISION_SIGN}", setting=setting)
        raise error(f"{prefix}no such file or folder: {name}{did_you_mean_path(name)}", setting=setting)


def own_code(error: Exception) -> str | None:
    """What to say of an error of transformers about code that comes with a model or tokenizer; None for other ones."""
    if "trust_remote_code" not in str(error):
        return None
    return "it needs Python code of its own, which is never run here (trust_remote_code stays off)"


def offline_if_unreachable() -> bool:
    """Switches ``huggingface_hub`` to its offline mode (cached files only) where its host has no address.

    Without this, a mistyped name costs half a minute of retries on a machine without network. Where a proxy is
    configured, names may resolve only there, and nothing is switched.

    Returns:
        Whether it is in its offline mode.
    """
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and not getproxies():
        try:
            socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, None)
        except OSError:
            constants.HF_HUB_OFFLINE = True
    return bool(constants.HF_HUB_OFFLINE)


def offline_if_needed(names: Iterable[str | None]) -> None:
    """Calls ``offline_if_unreachable`` where one of the names is not a local path."""
    if any(name is not None and not Path(name).exists() for name in names):
        offline_if_unreachable()


@contextmanager
def offline() -> Iterator[None]:
    """Cached files of the hub only, for as long as it is open."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
