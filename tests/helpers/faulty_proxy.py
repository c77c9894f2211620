"""A proxy in front of a server on this machine that answers as the network and overloaded servers do."""

from __future__ import annotations

import http.client
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from helpers.serving import serving

Fault = Literal["pass", "away", "lost", "500", "429", "404"]
"""away: the connection ends at once; lost: the server handles the request, but its answer gets lost; 404: a page of a proxy."""


class FaultyProxy(ThreadingHTTPServer):
    """Forwards requests to 127.0.0.1:`port`. Every request meets the next of `faults`, which repeat; `delay` is in seconds."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port = port
        self.delay = 0.0
        self.asked: list[str] = []
        """The paths of all requests."""
        self._next: Iterator[Fault] = itertools.repeat("pass")
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def set(self, faults: Sequence[Fault], delay: float = 0.0) -> None:
        self.delay = delay
        self._next = itertools.cycle(faults)

    def fault(self, path: str) -> Fault:
        """That of the next request."""
        with self._lock:
            self.asked.append(path)
            return next(self._next)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has given up is no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def _forward(self) -> None:
        fault = self.server.fault(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        time.sleep(self.server.delay)
        if fault == "away":
            self.close_connection = True
        elif fault in ("500", "429", "404"):
            self._answer(int(fault), b"<html>not now</html>", "text/html")
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
            headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            content = response.read()
            connection.close()
            if fault == "lost":
                self.close_connection = True
            else:
                self._answer(response.status, content, response.getheader("Content-Type") or "text/plain")

    def _answer(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _forward

    def log_message(self, *_: Any) -> None:
        """Nothing: the tests say what matters."""


@contextmanager
def faulty_proxy(port: int) -> Iterator[FaultyProxy]:
    """A proxy in front of 127.0.0.1:`port`, which passes everything until it is told otherwise."""
    with serving(FaultyProxy(port)) as proxy:
        yield proxy
