"""The hub's network, asked once before a name is looked up there."""

from __future__ import annotations

import socket
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import getproxies


def offline_if_unreachable() -> bool:
    """Switch `huggingface_hub` to its offline mode (cached files only) where its host has no address; returns the mode.

    Without this a mistyped path on a machine without network costs half a minute of retries before its error. Where a
    proxy is configured, names may resolve there only, and nothing is switched.
    """
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and not getproxies():
        try:
            socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, None)
        except OSError:
            constants.HF_HUB_OFFLINE = True
    return bool(constants.HF_HUB_OFFLINE)


def is_hub_name(path: str) -> bool:
    """Whether `path` has the form NAME or OWNER/NAME; a path from the root, with .., or deeper is a local one."""
    parts = Path(path).parts
    return 1 <= len(parts) <= 2 and not path.startswith((".", "/", "~")) and ".." not in parts
