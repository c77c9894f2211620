"""A real MLflow server on this machine, started like that of `minitron ui`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minitron_platform.addresses import free_ports

SERVE = """
import sys
from minitron_platform.tracking.server import serve
database, folder, port, auth = sys.argv[1:]
sys.exit(serve(database, folder, port=int(port), auth=auth == "auth", say=lambda line: print(line, flush=True)))
"""


def environment() -> dict[str, str]:
    """The environment of this process, with its import path for child processes."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def free_port() -> int:
    """A port at which nothing listens, and which the system gives to no other program meanwhile."""
    return free_ports(1)[0]


@contextmanager
def mlflow_server(folder: Path, port: int, *, auth: bool = False) -> Iterator[str]:
    """Serve `folder`/mlflow.db on `port`; yields the printed link when the server is ready: the address, with a password if it
    asks for one."""
    command = [sys.executable, "-c", SERVE, f"sqlite:///{folder}/mlflow.db", str(folder / "served"), str(port)]
    command.append("auth" if auth else "open")
    server = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        lines = [server.stdout.readline(), server.stdout.readline()]
        assert f"127.0.0.1:{port}" in lines[1], lines
        yield lines[1].split()[3].split("/#/")[0]
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
