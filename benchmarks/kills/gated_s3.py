"""An S3 server that logs every finished write, and holds one request that matches a pattern until it is told to go on.

    python -m benchmarks.kills.gated_s3 FOLDER

prints its port and serves until its standard input closes. In FOLDER it appends to `writes.log`, and reads `gate.json`.
"""

from __future__ import annotations

import io
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

GATE, HELD, LOG = "gate.json", "held.json", "writes.log"
POLL_SECONDS = 0.02


class Gate:
    """The next request to hold: `{"pattern", "stored"}` in `gate.json`. When it has come, the file is removed, and `held.json`
    has the client's port until the request goes on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.Lock()

    def hold(self, request: str, port: int, *, stored: bool) -> bool:
        """Wait while this request is the one to hold; returns whether it was. stored: whether it has been carried out."""
        with self.lock:
            try:
                gate = json.loads((self.folder / GATE).read_text())
            except FileNotFoundError:
                return False
            if gate["stored"] != stored or not re.search(gate["pattern"], request):
                return False
            (self.folder / GATE).unlink()
            (self.folder / "new").write_text(str(port))
            (self.folder / "new").replace(self.folder / HELD)
        while (self.folder / HELD).exists():
            time.sleep(POLL_SECONDS)
        return True


def gated(serve: Callable[..., Iterable[bytes]], folder: Path) -> Callable[..., Iterable[bytes]]:
    """The WSGI application `serve`, which logs and holds requests."""
    gate = Gate(folder)
    log = (folder / LOG).open("a", buffering=1)

    def handle(self: Any, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        port = int(environ["REMOTE_PORT"])
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        if length := int(environ.get("CONTENT_LENGTH") or 0):
            environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(length))
        if gate.hold(request, port, stored=False) and _is_closed(environ["werkzeug.socket"]):
            start_response("503 the client has gone", [])
            return []
        status = ""

        def respond(line: str, *arguments: Any) -> Any:
            nonlocal status
            status = line[:3]
            return start_response(line, *arguments)

        answer = list(serve(self, environ, respond))
        if environ["REQUEST_METHOD"] in ("PUT", "POST", "DELETE") and status.startswith("2"):
            log.write(json.dumps([time.time(), request, environ.get("QUERY_STRING", "")]) + "\n")
        gate.hold(request, port, stored=True)
        return answer

    return handle


def _is_closed(connection: socket.socket) -> bool:
    """Whether the client has closed the connection."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def main() -> None:
    import logging

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    DomainDispatcherApplication.__call__ = gated(DomainDispatcherApplication.__call__, Path(sys.argv[1]))
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    print(server.get_host_and_port()[1], flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
