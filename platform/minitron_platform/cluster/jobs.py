"""Runs as Ray jobs: submit, status, logs, stop, over the Jobs API of a cluster's head.

The driver runs on the cluster, so a run goes on when the terminal goes away. A job runs once and dies with its cluster;
what a run has finished lies in its storage, and submitting it again resumes it under the next attempt number.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from minitron import __version__
from minitron.errors import InputError, MinitronError
from minitron.storage import fingerprint
from minitron_platform.addresses import is_loopback
from minitron_platform.cluster.packaging import code_hash, stage_code
from minitron_platform.cluster.ray_session import auth_token

RECIPE_FILE = "recipe.yaml"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
SECRET = re.compile(r"TOKEN(?!IZ)|KEY|SECRET|PASSWORD", re.IGNORECASE)  # but not TOKENIZERS_PARALLELISM
CREDENTIALS = re.compile(r"://[^/@\s:]*:[^/@\s]+@")
CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
STOP_WAIT = 30.0  # seconds; Ray itself kills a driver 3 s after asking it to end


@dataclass(frozen=True)
class JobRow:
    """One submitted run: times in Unix seconds, `code` the content hash of the packages that were sent."""

    submission_id: str
    name: str
    status: str  # PENDING RUNNING SUCCEEDED FAILED STOPPED
    started: float | None
    ended: float | None
    message: str
    code: str
    version: str

    @property
    def is_active(self) -> bool:
        return self.status not in ENDED

    @property
    def work(self) -> str:
        """What every attempt at the same work shares: the submission id without its attempt."""
        return self.submission_id.rsplit("-a", 1)[0]

    @property
    def attempt(self) -> int:
        return int(self.submission_id.rsplit("-a", 1)[1])


def entrypoint_for(recipe_file: str, options: Mapping[str, str], overrides: Sequence[str] = ()) -> str:
    """The shell command of a run: option names without their dashes, an empty value for a flag, overrides as `a.b=c`,
    everything quoted."""
    words = ["python", "-m", "minitron_platform", "run", recipe_file]
    for name, value in options.items():
        words += [f"--{name}", *filter(None, [value])]
    for override in overrides:
        words += ["--set", override]
    return shlex.join(words)


def submit_text(
    recipe_yaml: str,
    *,
    name: str,
    address: str,
    overrides: Sequence[str] = (),
    options: Mapping[str, str] | None = None,
    env: Mapping[str, str] | None = None,
    entrypoint: str | None = None,
    insecure: bool = False,
    say: Callable[[str], None] | None = None,
) -> str:
    """Start a run on the cluster and return its submission id, `<name>-<fingerprint>-a<attempt>`.

    recipe_yaml: text of the recipe. It and the code are all that travels; data and models are found through storage.
    overrides, options: `a.b=c` settings and long options (`{"storage": "s3://..."}`) of the run's command.
    env: environment variables of the run, visible to everybody who sees the cluster's dashboard.
    entrypoint: a shell command in place of the run's own; overrides and options are then its own affair.
    insecure: allow an unencrypted address elsewhere without a token.
    say: receives what there is to tell, one line at a time. Default: standard error.

    The same work (recipe, settings, command, code) never runs twice at once: if it is pending or running, its id is
    returned. If it has ended, the next attempt is started and resumes from storage.
    Raises InputError for a bad name, address or a secret among the values, MinitronError if the head refuses or does
    not answer.
    """
    say = say or _to_stderr
    if not NAME.fullmatch(name):
        raise InputError(
            f"name {name!r}: not a run name", "use up to 64 of a-z 0-9 . _ - and begin with a letter or digit"
        )
    command = entrypoint or entrypoint_for(RECIPE_FILE, options or {}, overrides)
    _refuse_secrets(command, env or {})
    client = _connect(address, insecure)
    with tempfile.TemporaryDirectory(prefix="minitron-submit-") as folder:
        packages = stage_code(Path(folder) / "code")
        work_dir = Path(folder) / "work"
        work_dir.mkdir()
        (work_dir / RECIPE_FILE).write_text(recipe_yaml)
        code = code_hash(packages)
        work = f"{name}-{fingerprint([recipe_yaml, list(overrides), command, dict(env or {}), code])[:8]}"
        environment = {"MLFLOW_DISABLE_TELEMETRY": "true", **(env or {})}
        job = {
            "entrypoint": command,
            "runtime_env": {"py_modules": packages, "working_dir": str(work_dir), "env_vars": environment},
            "metadata": {"minitron.run": name, "minitron.code": code, "minitron.version": __version__},
        }
        with _head_errors(address):
            return _submit_once(client, name, work, job, say)


def _submit_once(
    client: JobSubmissionClient, name: str, work: str, job: Mapping[str, Any], say: Callable[[str], None]
) -> str:
    for _ in range(3):
        rows = _rows(client)
        for row in rows:
            if row.is_active and row.work == work:
                say(f"{row.submission_id} is already {row.status.lower()}; nothing was submitted")
                return row.submission_id
            if row.is_active and row.name == name:
                say(f"note: {row.submission_id}, of the same name but other content, is {row.status.lower()}")
        attempt = 1 + max((row.attempt for row in rows if row.work == work), default=0)
        try:
            submission_id: str = client.submit_job(submission_id=f"{work}-a{attempt}", **job)
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise
            continue  # somebody else submitted the same work since the list was read
        return submission_id
    raise MinitronError(
        f"{work}: attempt {attempt} exists but is not in the cluster's list", "submit under another name"
    )


def status(address: str, submission_id: str | None = None, *, insecure: bool = False) -> list[JobRow]:
    """The runs on the cluster, newest first; with an id or a run's name, that one alone."""
    client = _connect(address, insecure)
    with _head_errors(address):
        rows = _rows(client)
    return rows if submission_id is None else [_find(rows, submission_id)]


def logs(address: str, submission_id: str, follow: bool = False, *, insecure: bool = False) -> Iterator[str]:
    """The run's output in pieces as they come; with `follow`, until the run ends.

    Following needs a thread without a running event loop. Raises MinitronError if the connection is lost before the
    run ends.
    """
    client = _connect(address, insecure)
    with _head_errors(address):
        row = _find(_rows(client), submission_id)
        if follow:
            yield from _sync(client.tail_job_logs(row.submission_id))
            state = client.get_job_status(row.submission_id).value
            if state not in ENDED:
                raise MinitronError(
                    f"{row.submission_id}: the log ended while the job is {state.lower()}", "ask for the logs again"
                )
        else:
            yield client.get_job_logs(row.submission_id)


def stop(address: str, submission_id: str, *, insecure: bool = False) -> str:
    """Stop the run, wait until it has ended (at most half a minute) and return its status."""
    client = _connect(address, insecure)
    with _head_errors(address):
        row = _find(_rows(client), submission_id)
        client.stop_job(row.submission_id)
        deadline = time.monotonic() + STOP_WAIT
        state: str = client.get_job_status(row.submission_id).value
        while state not in ENDED and time.monotonic() < deadline:
            time.sleep(0.3)
            state = client.get_job_status(row.submission_id).value
        return state


class _Client(JobSubmissionClient):
    """Ray's client with an end to its patience: it has no timeouts of its own."""

    def _do_request(self, method: str, endpoint: str, **arguments: Any) -> Any:
        # (connect, read) seconds; the first request of all only asks for the version
        arguments.setdefault("timeout", (4, 8 if endpoint == "/api/version" else 60))
        return super()._do_request(method, endpoint, **arguments)


def _connect(address: str, insecure: bool) -> JobSubmissionClient:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(
            f"address {address!r}: not the address of a Jobs API",
            "give the head's dashboard, http://HOST:8265 or https://HOST (ray:// and port 6379 serve other purposes)",
        )
    if parts.password is not None:
        raise InputError(f"address at {parts.hostname}: holds a password", "give the token in RAY_AUTH_TOKEN_PATH")
    token = auth_token()
    if token is None and parts.scheme == "http" and not is_loopback(parts.hostname) and not insecure:
        raise InputError(
            f"address {address!r}: no cluster token is set, and whoever reaches a head without one can run code on it",
            "set RAY_AUTH_TOKEN_PATH to the file with the cluster's token, or forward the port and use "
            "http://127.0.0.1:8265; --insecure submits all the same",
        )
    for logger in CHATTY:
        logging.getLogger(logger).setLevel(logging.WARNING)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with _head_errors(address), _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        return _Client(address, headers=headers)


@contextmanager
def _without(*names: str) -> Iterator[None]:
    # Ray lets these variables replace the address it is given; the one asked for, and checked, is the one to use.
    taken = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)


@contextmanager
def _head_errors(address: str) -> Iterator[None]:
    try:
        yield
    except AuthenticationError as error:
        given = "the token was refused" if auth_token() else "it asks for a token"
        raise MinitronError(
            f"{address}: {given}",
            "set RAY_AUTH_TOKEN_PATH to the file with the cluster's token (on the head: `ray get-auth-token`)",
        ) from error
    except (OSError, aiohttp.ClientError) as error:  # requests' errors are OSErrors too
        raise MinitronError(
            f"{address}: no answer ({type(error).__name__})",
            "check that the head is up and that its dashboard port can be reached from here, forwarding it if need be",
        ) from error
    except RuntimeError as error:
        raise MinitronError(
            f"{address}: {str(error).strip().splitlines()[0][:500]}",
            "check that this is the dashboard of a Ray head of the version used here, and its logs",
        ) from error


def _rows(client: JobSubmissionClient) -> list[JobRow]:
    rows = [
        JobRow(
            submission_id=job.submission_id,
            name=job.metadata["minitron.run"],
            status=job.status.value,
            started=job.start_time / 1000 if job.start_time else None,
            ended=job.end_time / 1000 if job.end_time else None,
            message=(job.message or "").split(", last available logs")[0].split("\n")[0],
            code=job.metadata.get("minitron.code", ""),
            version=job.metadata.get("minitron.version", ""),
        )
        for job in client.list_jobs()
        if job.submission_id and "minitron.run" in (job.metadata or {})  # other people's jobs are theirs
    ]
    return sorted(rows, key=lambda row: row.started or time.time(), reverse=True)


def _find(rows: Sequence[JobRow], wanted: str) -> JobRow:
    """The job of that id, or of that run name: its active one, else the last attempt at its one piece of work."""
    for row in rows:
        if row.submission_id == wanted:
            return row
    named = [row for row in rows if wanted in (row.name, row.work)]
    active = [row for row in named if row.is_active]
    if len(active) == 1:
        return active[0]
    if named and not active and len({row.work for row in named}) == 1:
        return max(named, key=lambda row: row.attempt)
    known = ", ".join(f"{row.submission_id} ({row.status.lower()})" for row in (named or rows)) or "none"
    problem = "names more than one job" if named else "no such job"
    raise InputError(f"job {wanted!r}: {problem}", f"give one of: {known}")


def _refuse_secrets(command: str, env: Mapping[str, str]) -> None:
    for key, value in env.items():
        if SECRET.search(key) or CREDENTIALS.search(value):
            raise InputError(
                f"environment variable {key}: looks like a secret, and a job's environment is shown on the dashboard",
                "set it on the cluster's nodes instead (a Kubernetes secret, or the environment of `ray start`)",
            )
    if CREDENTIALS.search(command):
        raise InputError(
            "the job's command holds an address with a password, and it is shown on the dashboard",
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the store's own variables, on the cluster",
        )


def _sync(stream: AsyncIterator[str]) -> Iterator[str]:
    with asyncio.Runner() as runner:
        while (piece := runner.run(_next(stream))) is not None:
            yield piece


async def _next(stream: AsyncIterator[str]) -> str | None:
    return await anext(stream, None)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)
