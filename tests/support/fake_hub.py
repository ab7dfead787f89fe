"""A hub on the loopback address: keeps what is pushed to it, and gives files, as far as huggingface_hub asks."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

TOKEN = "hf_of_the_fake_hub"


@dataclass
class FakeHub:
    """What was pushed, and how the hub behaves.

    Attributes:
        endpoint: Its address.
        repos: OWNER/NAME -> whether it is private.
        branches: OWNER/NAME -> branches that were made.
        files: (OWNER/NAME, branch) -> name -> content.
        objects: Large files by their sha256.
        commits: OWNER/NAME -> branch, tag or commit -> commit, of what can be downloaded.
        contents: Commit -> folder with its files.
        fails_at: Part of a path at which it answers 403.
        waits_at: Part of a path at which it does not answer.
    """

    endpoint: str = ""
    repos: dict[str, bool] = field(default_factory=dict)
    branches: dict[str, list[str]] = field(default_factory=dict)
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    commits: dict[str, dict[str, str]] = field(default_factory=dict)
    contents: dict[str, Path] = field(default_factory=dict)
    fails_at: str = "nothing"
    waits_at: str = "nothing"
    stopped: threading.Event = field(default_factory=threading.Event)

    def add_commit(self, repo: str, folder: Path, *names: str) -> str:
        """A commit with the files of a folder, which branches and tags then mean."""
        commit = f"{len(self.contents) + 0xABC:040x}"
        self.contents[commit] = folder
        self.commits.setdefault(repo, {}).update(dict.fromkeys((*names, commit), commit))
        return commit

    def download(self, path: str) -> tuple[int, dict[str, str], bytes] | None:
        """Status, headers, and content of a file; None for other paths."""
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+).*", path)
        if found is None:
            return None
        commit = self.commits.get(found[1], {}).get(unquote(found[2]))
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        file = self.contents[commit] / unquote(found[3])
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        content = file.read_bytes()
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}, content

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON."""
        if self.waits_at in path:
            self.stopped.wait(30)
        if path.startswith("/objects/"):
            self.objects[path.rpartition("/")[2]] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}
        if self.fails_at in path:
            return 403, {"error": "You don't have the rights to create a model here"}
        if path == "/api/whoami-v2":
            return 200, {"name": "owner", "type": "user", "orgs": []}
        if path == "/api/validate-yaml":  # of the model card
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'owner'}/{asked['name']}"
            if name in self.repos:
                return 409, {"url": f"{self.endpoint}/{name}"}
            self.repos[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
            return 200, {"url": f"{self.endpoint}/{name}"}
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/?]+).*", path):
            commit = self.commits.get(found[1], {}).get(unquote(found[3]))
            if commit is None:
                return 404, {"error": "Invalid rev id"}
            names = sorted(file.name for file in self.contents[commit].iterdir())
            if found[2] == "tree":
                return 200, [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in names]
            return 200, {"id": found[1], "sha": commit, "siblings": [{"rfilename": name} for name in names]}
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/([^/?]+).*", path):
            return getattr(self, f"_{found[2]}")(found[1], found[3], body)
        if path.endswith("/info/lfs/objects/batch"):
            uploads = [
                {**entry, "actions": {"upload": {"href": f"{self.endpoint}/objects/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": uploads}
        return 404, {"error": f"{method} {path} is not known here"}

    def _branch(self, repo: str, branch: str, _: bytes) -> tuple[int, Any]:
        self.branches.setdefault(repo, []).append(branch)
        return 200, {}

    def _preupload(self, repo: str, branch: str, body: bytes) -> tuple[int, Any]:
        files = json.loads(body)["files"]
        modes = {True: "lfs", False: "regular"}
        return 200, {"files": [
            {"path": file["path"], "uploadMode": modes[file["path"].endswith(".safetensors")], "shouldIgnore": False}
            for file in files
        ]}  # fmt: skip

    def _commit(self, repo: str, branch: str, body: bytes) -> tuple[int, Any]:
        held = self.files.setdefault((repo, branch), {})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                held[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                held[value["path"]] = self.objects[value["oid"]]
        return 200, {"commitUrl": f"{self.endpoint}/{repo}/commit/1", "commitOid": "1" * 40, "hookOutput": ""}


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """The hub, for as long as the context lasts."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.command in ("GET", "HEAD") and (file := hub.download(self.path)) is not None:
                status, headers, content = file
            else:
                status, value = hub.answer(self.command, self.path, self.headers.get("Authorization") or "", body)
                headers, content = {"Content-Type": "application/json"}, json.dumps(value).encode()
            self.send_response(status)
            for name, text in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = _handle

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.stopped.set()
        server.shutdown()
        server.server_close()
        time.sleep(0)
        thread.join(10)


@contextmanager
def hub_in_place(cache: Path) -> Iterator[FakeHub]:
    """``fake_hub`` in the place of huggingface_hub's, with a cache of its own."""
    from huggingface_hub import constants

    with fake_hub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + template)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # large files go over HTTP
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no token"))
        patch.setenv("HF_TOKEN", TOKEN)
        yield hub
