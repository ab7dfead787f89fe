"""A hub on the loopback address that keeps what is pushed to it, as far as huggingface_hub asks."""

from __future__ import annotations

import base64
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

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
        fails_at: Part of a path at which it answers 403.
        waits_at: Part of a path at which it does not answer.
    """

    endpoint: str = ""
    repos: dict[str, bool] = field(default_factory=dict)
    branches: dict[str, list[str]] = field(default_factory=dict)
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    fails_at: str = "nothing"
    waits_at: str = "nothing"
    stopped: threading.Event = field(default_factory=threading.Event)

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
            status, value = hub.answer(self.command, self.path, self.headers.get("Authorization") or "", body)
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
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
