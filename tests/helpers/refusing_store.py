"""An object store that gives every request the same answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from helpers.serving import serving


class RefusingStore(ThreadingHTTPServer):
    """Answers each request with `status`, `headers` and `body`; counts them."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    requests = 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: RefusingStore

    def _answer(self) -> None:
        self.server.requests += 1
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b"" if self.command == "HEAD" else self.server.body
        self.send_response(self.server.status)
        for name, value in {**self.server.headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _answer

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def refusing_store(status: int, body: str, **headers: str) -> Iterator[RefusingStore]:
    """The store, on a free port of this machine. headers: by their names with underscores."""
    server = RefusingStore(("127.0.0.1", 0), _Handler)
    server.status, server.body = status, body.encode()
    server.headers = {name.replace("_", "-"): value for name, value in headers.items()}
    with serving(server):
        yield server
