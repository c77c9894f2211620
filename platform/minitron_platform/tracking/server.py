"""MLflow's web interface for the experiments and models of a storage."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

from minitron.errors import InputError, MinitronError
from minitron.loopback import is_loopback
from minitron.storage import disk_errors, is_local, local_path, redact
from minitron_platform.stopping import stopped_by_signals
from minitron_platform.tracking.flusher import create_database, prepare_mlflow, sqlite_path
from minitron_platform.tracking.links import experiments_link, newest_run_links
from minitron_platform.tracking.ui_password import USER, auth_settings, read_password

START_SECONDS = 90.0  # longest start of the server: imports, and the tables of a new database
STOP_SECONDS = 10.0  # after SIGTERM until SIGKILL


def serve(
    tracking_uri: str,
    artifact_root: str,
    *,
    host: str = "127.0.0.1",
    port: int = 5000,
    insecure: bool = False,
    auth: bool = True,
    say: Callable[[str], None] = print,
) -> int:
    """Run MLflow's server for the database `tracking_uri` until Ctrl-C or SIGTERM; returns the exit code.

    If `tracking_uri` is a server, it has a web interface already: its address is printed, and nothing is started.
    artifact_root: folder or address for the artifacts of experiments that are created through this server.
    host, port: that the server listens on. insecure: allow a host that other machines can reach. auth: ask for the user's
    password (see `ui_password`); without, every user of the machine can read whatever this one can. say: receives messages, of
    which the one that the server is ready contains the password.
    Raises InputError for a host that other machines can reach without `insecure`, and for a port that cannot be used,
    MinitronError with the end of the server's log if it does not start.
    """
    if tracking_uri.startswith("http"):
        say(f"MLflow is at {experiments_link(redact(tracking_uri))}")
        return 0
    if not insecure and not is_loopback(host):
        raise InputError(
            f"host {host!r} can be reached from other machines, and passwords and data would be sent unencrypted",
            "use 127.0.0.1 with a tunnel (ssh -L), or add --insecure",
        )
    _check_free(host, port)
    prepare_mlflow(tracking_uri)
    create_database(tracking_uri)
    if is_local(artifact_root):
        artifact_root = str(local_path(artifact_root))
        with disk_errors(artifact_root):
            os.makedirs(artifact_root, exist_ok=True)
    database = sqlite_path(tracking_uri)
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--artifacts-destination", artifact_root]
    where = f"{f'[{host}]' if ':' in host else host}:{port}"
    address = link = f"http://{where}"
    with tempfile.TemporaryDirectory(prefix="minitron-ui-") as folder, open(f"{folder}/log", "w+b") as output:
        store = tracking_uri if database is None else f"sqlite:///{database}"
        environment = {
            **os.environ,
            "MLFLOW_BACKEND_STORE_URI": store,  # not as an argument, which `ps` would show with its password
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        if auth:
            password = read_password()
            environment |= auth_settings(Path(folder), password)
            command += ["--app-name", "basic-auth"]
            link = f"http://{USER}:{password}@{where}"
        # In its own session, so that one signal to the process group ends the server and its workers.
        server = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        with stopped_by_signals():
            try:
                say("MLflow is starting")
                if not _wait_until_healthy(server, address):
                    output.seek(0)
                    tail = output.read().decode(errors="replace")[-2000:]
                    raise MinitronError(
                        f"MLflow's server did not start:\n{tail}", "fix the problem in its log and try again"
                    )
                links = newest_run_links(store, link)
                say(f"MLflow is at {links[0] if links else experiments_link(link)}  (Ctrl-C stops it)")
                if links:
                    say(f"the report of the newest run: {links[1]}")
                return server.wait()
            except KeyboardInterrupt:
                say("MLflow stopped")
                return 0
            finally:
                _stop(server)


def _check_free(host: str, port: int) -> None:
    """Raise InputError for a port that cannot be used."""
    if not 0 < port < 65536:  # getaddrinfo takes its last 16 bits
        raise InputError(f"port {port} does not exist", "choose one from 1 to 65535 with --port")
    try:
        family, kind, protocol, _, socket_address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(socket_address)
    except OSError as error:
        raise InputError(
            f"port {port} of {host} cannot be used: {error.strerror or error}", "choose another port with --port"
        ) from error


def _wait_until_healthy(server: subprocess.Popen[bytes], address: str) -> bool:
    """Wait until the server answers; False if it ends before, or takes longer than START_SECONDS."""
    deadline = time.monotonic() + START_SECONDS
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({})
    )  # without a proxy: the server is on this machine
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with opener.open(f"{address}/health", timeout=5) as answer:
                if answer.status == 200:
                    return True
        except (URLError, OSError):
            time.sleep(0.2)
    return False


def _stop(server: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(STOP_SECONDS)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
