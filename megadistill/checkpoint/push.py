"""A model folder to a hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megadistill.data.hub import offline_if_unreachable
from megadistill.errors import CheckpointError, ConfigError, first_line

# Seconds without an answer after which a request has failed; the library itself would wait for ever.
ANSWER_S = 60.0
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check_push(repo: str) -> None:
    """Whether a repository could be written to, before there is anything to write.

    Raises:
        ConfigError: The name is no OWNER/NAME, there is no token, or the hub does not take it or does not answer.
    """
    if _NAME.fullmatch(repo) is None:
        raise ConfigError(f"--push {repo}: a repository is OWNER/NAME")
    from huggingface_hub import HfApi, constants, get_token

    if offline_if_unreachable():
        raise ConfigError(f"--push {repo}: {constants.ENDPOINT} cannot be reached, or HF_HUB_OFFLINE is set")
    if get_token() is None:
        raise ConfigError(f"--push {repo}: there is no token; set HF_TOKEN, or log in with: hf auth login")
    with _hub_errors(f"--push {repo}: the token was not accepted", ConfigError):
        HfApi().whoami()


def push_folder(folder: Path, repo: str, *, private: bool, revision: str | None) -> str:
    """Uploads every file of a folder as a commit; files of the same names get a new version.

    Args:
        folder: The folder.
        repo: OWNER/NAME; made if there is none.
        private: Whether a repository that is made is private; one that exists stays as it is.
        revision: A branch, made if there is none; None: the main one.

    Returns:
        Where it is.

    Raises:
        CheckpointError: The hub refuses, or does not answer. What was exported stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _hub_errors(f"--push {repo}", CheckpointError):
        made = api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, revision=revision, commit_message="Exported by megadistill")
    return str(made)


@contextmanager
def _hub_errors(what: str, error_type: type[CheckpointError] | type[ConfigError]) -> Iterator[None]:
    """Errors of the hub as one line, and no request that waits for ever."""
    from huggingface_hub import get_session
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, XetDownloadError

    # Of the library below, which is another one in other versions; timeouts and refused connections are among them.
    transport_error: Any = HfHubHTTPError.__bases__[0]
    session: Any = get_session()
    before, session.timeout = session.timeout, ANSWER_S
    try:
        yield
    except (transport_error, HFValidationError, LocalTokenNotFoundError, XetDownloadError, OSError) as error:
        raise error_type(f"{what}: {first_line(error)}") from None
    finally:
        session.timeout = before
