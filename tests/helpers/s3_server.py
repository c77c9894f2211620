"""A real S3 server on a free port of this machine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import s3fs

SERVE = """
import logging, sys
from moto.server import ThreadedMotoServer
from moto.moto_server.werkzeug_app import DomainDispatcherApplication

logging.getLogger("werkzeug").setLevel(logging.ERROR)
if len(sys.argv) > 1:
    log = open(sys.argv[1], "a", buffering=1)
    serve = DomainDispatcherApplication.__call__

    def counted(self, environ, start_response):
        query = environ.get("QUERY_STRING", "")
        log.write(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}{'?' if query else ''}{query}\\n")
        return serve(self, environ, start_response)

    DomainDispatcherApplication.__call__ = counted
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def s3_server(log: Path | None = None) -> Iterator[dict[str, str]]:
    """Serve S3 in a process of its own; yields the environment variables that direct s3:// addresses to it.

    log: file to which each request is added as a line: its method, then its path and query.
    """
    command = [sys.executable, "-c", SERVE, *([str(log)] if log else [])]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        s3fs.S3FileSystem.clear_instance_cache()  # one of another server's address may be there
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        assert server.stdin is not None
        server.stdin.close()
        assert server.wait(30) == 0
