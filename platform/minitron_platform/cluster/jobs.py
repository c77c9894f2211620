"""Runs as Ray jobs: submit, status, logs and stop, over the Jobs API of a cluster's head.

The driver of the run is on the cluster, so the run does not need the terminal that submitted it. Ray does not restart a job
that ended, or that was lost with its cluster. Finished work is in the storage; submitting the run again starts a new job, with
the next attempt number, that resumes it.
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

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from minitron import __version__
from minitron.errors import InputError, MinitronError
from minitron.storage import fingerprint, secret_in
from minitron.text import printable
from minitron_platform.addresses import check_jobs_address, check_token_address
from minitron_platform.cluster.packaging import code_hash, stage_code
from minitron_platform.cluster.ray_session import auth_token

RECIPE_FILE = "recipe.yaml"
RESUME_VARIABLE = "MINITRON_RESUME"  # environment variable with the command that resumes this process's run
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
SECRET = re.compile(r"TOKEN(?!IZ)|KEY|SECRET|PASSWORD", re.IGNORECASE)  # but not TOKENIZERS_PARALLELISM
NOISY_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
STOP_WAIT = 30.0  # seconds; Ray kills a driver 3 s after SIGTERM


@dataclass(frozen=True)
class JobRow:
    """A submitted run."""

    submission_id: str
    name: str
    """Of the run."""
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    started: float | None
    """Unix time in seconds."""
    ended: float | None
    """Unix time in seconds."""
    message: str
    """Ray's explanation of the status, its first line."""
    code: str
    """Content hash of the packages that were sent."""
    version: str
    """Of Minitron, where the run was submitted."""
    resume: str = ""
    """The command that submitted it, which submits it again; empty if it was submitted from Python."""

    @property
    def is_active(self) -> bool:
        """Whether the job is pending or running."""
        return self.status not in ENDED

    @property
    def work(self) -> str:
        """Identifies the recipe, settings and code; all attempts have it in common. The submission id without the attempt."""
        return self.submission_id.rsplit("-a", 1)[0]

    @property
    def attempt(self) -> int:
        """Number of the attempt, from 1."""
        return int(self.submission_id.rsplit("-a", 1)[1])


def entrypoint_for(recipe_file: str, options: Mapping[str, str], overrides: Sequence[str] = ()) -> str:
    """The shell command that runs a recipe.

    options: values by option name without dashes; an empty value for a flag. overrides: `--set` arguments such as `a.b=c`.
    """
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
    resume: str = "",
    insecure: bool = False,
    say: Callable[[str], None] | None = None,
) -> str:
    """Start a run on the cluster and return its submission id, `<name>-<fingerprint>-a<attempt>`.

    recipe_yaml: text of the recipe. Only the recipe and the code are sent to the cluster, no data and no models.
    name: name of the run.
    address: of the cluster's Jobs API, http://HOST:8265.
    overrides, options: `--set` arguments and long options (`{"storage": "s3://..."}`) of the run's command.
    env: environment variables of the run, which everybody who can open the cluster's dashboard can read.
    entrypoint: a shell command to run instead; overrides and options are not added to it.
    insecure: allow an unencrypted address of another machine.
    resume: the command that submits it again, which the job prints when it is stopped.
    say: receives messages for the user, one line at a time. Default: standard error.

    The same work (recipe, settings, command, code) never runs twice at the same time: if it is pending or running, its id is
    returned. If it has ended, the next attempt is started, which resumes it.
    Raises InputError for an invalid name or address and for a secret in `env` or the command, MinitronError if the head refuses
    or does not answer.
    """
    say = say or to_stderr
    if not NAME.fullmatch(name):
        raise InputError(
            f"name {name!r}: not a valid run name", "use at most 64 of a-z 0-9 . _ - and begin with a letter or digit"
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
        environment = {"MLFLOW_DISABLE_TELEMETRY": "true", RESUME_VARIABLE: resume, **(env or {})}
        job = {
            "entrypoint": command,
            "runtime_env": {"py_modules": packages, "working_dir": str(work_dir), "env_vars": environment},
            "metadata": {
                "minitron.run": name,
                "minitron.code": code,
                "minitron.version": __version__,
                "minitron.resume": resume,
            },
        }
        with _head_errors(address):
            return _submit_once(client, name, work, job, say)


def _submit_once(
    client: JobSubmissionClient, name: str, work: str, job: Mapping[str, Any], say: Callable[[str], None]
) -> str:
    """Submit the next attempt at `work` unless one is active; returns the submission id."""
    for _ in range(3):
        rows = _rows(client)
        for row in rows:
            if row.is_active and row.work == work:
                say(f"{row.submission_id} is already {row.status.lower()}; nothing was submitted")
                return row.submission_id
            if row.is_active and row.name == name:
                say(f"note: another run with the name {name} is {row.status.lower()}: {row.submission_id}")
        attempt = 1 + max((row.attempt for row in rows if row.work == work), default=0)
        try:
            submission_id: str = client.submit_job(submission_id=f"{work}-a{attempt}", **job)
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise
            continue  # another user has submitted the same work since the list was read
        return submission_id
    raise MinitronError(
        f"{work}: attempt {attempt} exists, but the cluster does not list it", "submit with another name"
    )


def status(address: str, submission_id: str | None = None, *, insecure: bool = False) -> list[JobRow]:
    """The submitted runs, newest first.

    address, insecure: as for `submit_text`. submission_id: return only the run with this submission id or name.
    Raises InputError for an id or name that does not identify one run, MinitronError if the head refuses or does not answer.
    """
    client = _connect(address, insecure)
    with _head_errors(address):
        rows = _rows(client)
    return rows if submission_id is None else [_find(rows, submission_id)]


def logs(address: str, submission_id: str, follow: bool = False, *, insecure: bool = False) -> Iterator[str]:
    """The output of a run, in pieces; with `follow`, new output as it comes until the run ends.

    `follow` needs a thread without a running event loop. Raises what `status` raises, and MinitronError if the connection is
    lost before the run ends.
    """
    client = _connect(address, insecure)
    with _head_errors(address):
        row = _find(_rows(client), submission_id)
        if follow:
            yield from _sync(client.tail_job_logs(row.submission_id))
            state = client.get_job_status(row.submission_id).value
            if state not in ENDED:
                raise MinitronError(
                    f"{row.submission_id}: the log ended while the job is {state.lower()}", "run the command again"
                )
        else:
            yield client.get_job_logs(row.submission_id)


def stop(address: str, submission_id: str, *, insecure: bool = False) -> str:
    """Stop a run, wait until it has ended (at most 30 s) and return its status. Raises what `status` raises."""
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
    """Ray's client with timeouts, of which it has none itself."""

    def _do_request(self, method: str, endpoint: str, **arguments: Any) -> Any:
        # (connect, read) in seconds; the first request is always the one for the version
        arguments.setdefault("timeout", (4, 8 if endpoint == "/api/version" else 60))
        return super()._do_request(method, endpoint, **arguments)


def _connect(address: str, insecure: bool) -> JobSubmissionClient:
    """A client for the Jobs API at `address`. Raises InputError for an address that is invalid or not safe to use."""
    check_jobs_address(address)
    token = auth_token()
    check_token_address(address, token, insecure=insecure)
    for logger in NOISY_LOGGERS:
        logging.getLogger(logger).setLevel(logging.WARNING)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with _head_errors(address), _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        return _Client(address, headers=headers)


@contextmanager
def _without(*names: str) -> Iterator[None]:
    # Ray prefers the address in these variables to the one that it is given, which is the one that was checked.
    removed = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(removed)


@contextmanager
def _head_errors(address: str) -> Iterator[None]:
    """Turn the errors of Ray's client into MinitronErrors."""
    try:
        yield
    except AuthenticationError as error:
        reason = "the head refused the token" if auth_token() else "the head requires a token"
        raise MinitronError(
            f"{address}: {reason}",
            "set RAY_AUTH_TOKEN_PATH to the file with the cluster's token (on the head: `ray get-auth-token`)",
        ) from error
    except (OSError, aiohttp.ClientError) as error:  # the errors of `requests` are OSErrors
        raise MinitronError(
            f"{address}: no answer ({type(error).__name__})",
            "check that the head is running and that this machine can reach its dashboard port; forward it if necessary",
        ) from error
    except RuntimeError as error:
        raise MinitronError(
            f"{address}: {str(error).strip().splitlines()[0][:500]}",
            "check that this is the dashboard of a Ray head with the same version of Ray as here, and its logs",
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
            resume=job.metadata.get("minitron.resume", ""),
        )
        for job in client.list_jobs()
        if job.submission_id and "minitron.run" in (job.metadata or {})  # not jobs of other programs
    ]
    return sorted(rows, key=lambda row: row.started or time.time(), reverse=True)


def _find(rows: Sequence[JobRow], name: str) -> JobRow:
    """The job with the submission id or run name `name`. For a run name, its only active job, or the last attempt if all of
    its attempts are at the same work. Raises InputError if there is none or more than one."""
    for row in rows:
        if row.submission_id == name:
            return row
    named = [row for row in rows if name in (row.name, row.work)]
    active = [row for row in named if row.is_active]
    if len(active) == 1:
        return active[0]
    if named and not active and len({row.work for row in named}) == 1:
        return max(named, key=lambda row: row.attempt)
    known = ", ".join(f"{row.submission_id} ({row.status.lower()})" for row in (named or rows)) or "none"
    problem = "more than one job has this name" if named else "no such job"
    raise InputError(f"job {name!r}: {problem}", f"give one of: {known}")


def _refuse_secrets(command: str, env: Mapping[str, str]) -> None:
    """Raise InputError for what looks like a secret: Ray shows both on the dashboard."""
    for key, value in env.items():
        if SECRET.search(key) or secret_in(value):
            raise InputError(
                f"environment variable {key}: looks like a secret, and the dashboard shows the environment of a job",
                "set it on the cluster's nodes instead (a Kubernetes secret, or the environment of `ray start`)",
            )
    if secret := secret_in(command):
        raise InputError(
            f"the job's command contains an address with {secret}, and the dashboard shows the command",
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, PGPASSWORD, or the storage's variables, on the "
            "cluster's nodes",
        )


def _sync(stream: AsyncIterator[str]) -> Iterator[str]:
    """An asynchronous iterator as an ordinary one."""
    with asyncio.Runner() as runner:
        while (piece := runner.run(_next(stream))) is not None:
            yield piece


async def _next(stream: AsyncIterator[str]) -> str | None:
    return await anext(stream, None)


def to_stderr(line: str) -> None:
    """Print a message for the user to standard error."""
    print(printable(line), file=sys.stderr)
