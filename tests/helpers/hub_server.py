"""A stand-in for the Hugging Face hub on this machine, as far as an upload or download of a model needs it: it keeps the files
of commits. Weights go by Git LFS, so a client has to set `HF_HUB_DISABLE_XET`."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from helpers.serving import serving


class Hub(ThreadingHTTPServer):
    """Accepts requests with `TOKEN`.

    files: content of each path in the newest commit. earlier: the same of the others, by commit. created: requests for
    repositories. public: names of repositories that exist and that everybody can read. objects: content of the large files, by
    SHA-256. sent: the SHA-256 of those that a client has sent. refused: that of one that is not accepted. gated: names of
    repositories whose weights nobody may read. cut: of those whose weights are sent in part.
    """

    TOKEN = "hf_stand_in"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commit = "1" * 40
        self.files: dict[str, bytes] = {}
        self.earlier: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.public: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.sent: list[str] = []
        self.refused = ""
        self.gated: set[str] = set()
        self.cut: set[str] = set()
        self.address = f"http://127.0.0.1:{self.server_port}"

    def push(self, files: dict[str, bytes]) -> None:
        """Replace the files, in a new commit."""
        self.earlier[self.commit] = self.files
        self.commit, self.files = str(len(self.earlier) + 1) * 40, files

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        """The commit that a revision means, and its files."""
        return (revision, self.earlier[revision]) if revision in self.earlier else (self.commit, self.files)


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {Hub.TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            made = self.server.created[-1]
            name = f"{made.get('organization') or 'me'}/{made['name']}"
            status = 409 if name in self.server.public else 200
            return self._answer(status, {"url": f"{self.server.address}/{name}"})
        if "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": _mode(file["path"]), "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    self.server.files[line["value"]["path"]] = self.server.objects[line["value"]["oid"]]
            url = f"{self.server.address}/{'/'.join(self.path.split('/')[3:5])}/commit/1"
            return self._answer(200, {"commitUrl": url, "commitOid": "1", "success": True})
        if self.path.endswith("/info/lfs/objects/batch"):
            return self._answer(200, {"objects": [self._object(each) for each in json.loads(body)["objects"]]})
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"warnings": [], "errors": []})
        return self._answer(404, {"error": "not found"})

    def _object(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """How to send a large file; nothing if it is here."""
        if wanted["oid"] in self.server.objects:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.server.address}/objects/{wanted['oid']}"}}}

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        name = self.path.removeprefix("/objects/")
        self.server.sent.append(name)
        if name == self.server.refused:
            return self._answer(400, {"error": "interrupted"})
        self.server.objects[name] = body
        return self._answer(200, {})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.path.startswith(("/api/models/", "/api/datasets/")):
            if "/tree/" in self.path:
                _, files = self.server.at(self.path.partition("/tree/")[2].split("/")[0].split("?")[0])
                listed = [{"type": "file", "path": p, "size": len(d), "oid": "0"} for p, d in files.items()]
                return self._answer(200, listed)
            name, _, revision = self.path.removeprefix("/api/").partition("/")[2].partition("/revision/")
            commit, files = self.server.at(revision.split("?")[0])
            about = {"id": name, "private": name not in self.server.public, "sha": commit}
            return self._answer(200, about | {"siblings": [{"rfilename": file} for file in files]})
        if "/resolve/" in self.path:
            name, _, file = self.path.removeprefix("/datasets")[1:].partition("/resolve/")
            return self._send(name, *file.split("/", 1))
        return self._answer(404, {"error": "not found"})

    def _send(self, name: str, revision: str, file: str) -> None:
        """Answer with a file, or the part of it that is asked for."""
        is_weights = _mode(file) == "lfs"
        if name in self.server.gated and is_weights:
            return self._answer(403, {"error": "restricted"}, {"X-Error-Code": "GatedRepo"})
        commit, files = self.server.at(revision)
        if file not in files:
            return self._answer(404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"})
        data = files[file]
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            data = data[int(first) : int(last) + 1 if last else None]
        self.send_response(206 if wanted else 200)
        for header, value in {
            "Content-Length": len(data),
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": commit,
        }.items():
            self.send_header(header, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:100] if name in self.server.cut and is_weights and not wanted else data)
        return None

    def _answer(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, content in (headers or {}).items():
            self.send_header(name, content)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"


@contextmanager
def hub_server() -> Iterator[Hub]:
    with serving(Hub()) as hub:
        yield hub
