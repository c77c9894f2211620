"""Starts a run as a Ray job, or the job of an earlier one again."""

from __future__ import annotations

import json
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ray.job_submission import JobSubmissionClient

from minitron import __version__
from minitron.errors import InputError, MinitronError
from minitron.storage import fingerprint, secret_in
from minitron.text import printable
from minitron_platform.cluster.brought import Brought
from minitron_platform.cluster.job_check import Dependencies, packages_to_bring
from minitron_platform.cluster.job_rows import find_job, job_rows
from minitron_platform.cluster.jobs_api import connect, head_errors
from minitron_platform.cluster.packaging import code_hash, stage_code
from minitron_search.nodes import Node

RECIPE_FILE = "recipe.yaml"
RECIPE_KEY = "minitron.recipe"  # of a job's metadata: the text of its recipe
NEEDS_KEY = "minitron.needs"  # of a job's metadata: its JobNeeds, as JSON
RESUME_VARIABLE = "MINITRON_RESUME"  # environment variable with the command that resumes this process's run
STOP_SECONDS = 40  # from SIGTERM until Ray kills a job's command, which ends its records and its workers meanwhile
OWN_VARIABLES = {"MLFLOW_DISABLE_TELEMETRY": "true", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
# Ray installs uv with pip into the environment of the job, where pip would find that of the node, which does not work there
UV_VARIABLES = {"PIP_IGNORE_INSTALLED": "1"}
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
SECRET = re.compile(r"TOKEN(?!IZ)|KEY|SECRET|PASSWORD", re.IGNORECASE)  # but not TOKENIZERS_PARALLELISM


@dataclass(frozen=True)
class JobNeeds:
    """What the command of a job needs on the cluster."""

    dependencies: Dependencies = "as-is"
    """Where its packages come from, see `minitron_platform.cluster.job_check.packages_to_bring`."""
    extras: tuple[str, ...] = ()
    """Minitron's extras that it needs, such as "s3"."""
    driver_cpus: float = 0.0
    """Without CPUs and memory it runs on the head, even if that has no CPUs for others."""
    driver_memory: int = 0
    """Bytes."""
    brought: Brought = field(default_factory=Brought)
    """Packages that it installs."""

    def json(self) -> str:
        """Without `brought`, which depends on the nodes of the moment."""
        return json.dumps({name: value for name, value in asdict(self).items() if name != "brought"})

    @classmethod
    def from_json(cls, text: str) -> JobNeeds:
        """What `json` has written, also before there was `brought`."""
        values = json.loads(text)
        values.pop("packages", None)
        return cls(**{**values, "extras": tuple(values["extras"])})

    @property
    def entrypoint_resources(self) -> dict[str, Any]:
        """Arguments of Ray's submit_job."""
        resources = {"entrypoint_num_cpus": self.driver_cpus, "entrypoint_memory": self.driver_memory}
        return {name: amount for name, amount in resources.items() if amount}


def entrypoint_for(recipe_file: str, options: Mapping[str, str], overrides: Sequence[str] = ()) -> str:
    """The shell command that runs a recipe.

    options: values by option name without dashes; an empty value for a flag. overrides: `--set` arguments such as `a.b=c`.
    """
    # with `exec` no shell is between Ray and the run, which would go on without Ray's knowledge if only that were killed
    words = ["exec", "python", "-m", "minitron_platform", "run", recipe_file]
    for name, value in options.items():
        words += [f"--{name}", *filter(None, [value])]
    for override in overrides:
        words += ["--set", override]
    return shlex.join(words)


def checked(
    needs: JobNeeds,
    *,
    address: str,
    insecure: bool = False,
    say: Callable[[str], None] | None = None,
    check_room: Callable[[Sequence[Node]], object] = lambda nodes: None,
) -> JobNeeds:
    """`needs` with the packages that a job has to bring to the cluster at `address`.

    check_room: called with the cluster's nodes, and those that it may start, unless nothing is checked there. Raises what it
    raises, InputError if the cluster has a Ray, Python or packages that Minitron does not run with, and what `submit_text`
    raises.
    """
    client = connect(address, insecure)
    with head_errors(address):
        brought = packages_to_bring(
            client, needs.dependencies, needs.extras, needs.entrypoint_resources, say or to_stderr, check_room
        )
    return replace(needs, brought=brought)


def submit_text(
    recipe_yaml: str,
    *,
    name: str,
    address: str,
    overrides: Sequence[str] = (),
    options: Mapping[str, str] | None = None,
    env: Mapping[str, str] | None = None,
    entrypoint: str | None = None,
    needs: JobNeeds | None = None,
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
    needs: resources of the command and packages that it brings, as `checked` returns them. Default: none.
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
    needs = needs or JobNeeds()
    command = entrypoint or entrypoint_for(RECIPE_FILE, options or {}, overrides)
    _refuse_secrets(command, recipe_yaml, env or {})
    client = connect(address, insecure)
    with tempfile.TemporaryDirectory(prefix="minitron-submit-") as folder:
        packages = stage_code(Path(folder) / "code")
        work_dir = Path(folder) / "work"
        work_dir.mkdir()
        (work_dir / RECIPE_FILE).write_text(recipe_yaml)
        code = code_hash(packages)
        work = f"{name}-{fingerprint([recipe_yaml, list(overrides), command, dict(env or {}), code])[:8]}"
        environment = {**OWN_VARIABLES, RESUME_VARIABLE: resume, **(env or {})}
        if needs.brought.packages:
            environment |= UV_VARIABLES
        job = {
            "entrypoint": command,
            "runtime_env": {
                "py_modules": packages,
                "working_dir": str(work_dir),
                "env_vars": environment,
                **needs.brought.runtime_env(work_dir),
            },
            "metadata": {
                "minitron.run": name,
                "minitron.code": code,
                "minitron.version": __version__,
                "minitron.resume": resume,
                RECIPE_KEY: recipe_yaml,
                NEEDS_KEY: needs.json(),
            },
            **needs.entrypoint_resources,
        }
        with head_errors(address):
            return _submit_once(client, name, work, job, say)


def _submit_once(
    client: JobSubmissionClient, name: str, work: str, job: Mapping[str, Any], say: Callable[[str], None]
) -> str:
    """Submit the next attempt at `work` unless one is active; returns the submission id."""
    for _ in range(3):
        rows = job_rows(client)
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


def resume(
    address: str, submission_id: str, *, insecure: bool = False, say: Callable[[str], None] | None = None
) -> str:
    """Start a run again with the recipe, settings and environment of an earlier job, and return the new submission id.

    The code is that of this machine. Nothing is submitted if the job is still active; its id is returned then.
    Raises InputError for a job of a version of Minitron that did not keep the recipe, and what `status` and `submit_text`
    raise.
    """
    say = say or to_stderr
    client = connect(address, insecure)
    with head_errors(address):
        row = find_job(job_rows(client), submission_id)
        if row.is_active:
            say(f"{row.submission_id} is {row.status.lower()}; nothing was submitted")
            return row.submission_id
        job = client.get_job_info(row.submission_id)
    metadata = job.metadata or {}
    if RECIPE_KEY not in metadata:
        raise InputError(
            f"job {row.submission_id}: its recipe was not kept",
            f"submit it again: {row.resume or 'minitron submit RECIPE'}",
        )
    needs = JobNeeds.from_json(metadata[NEEDS_KEY])
    sent = (job.runtime_env or {}).get("env_vars", {})
    return submit_text(
        metadata[RECIPE_KEY],
        name=row.name,
        address=address,
        entrypoint=job.entrypoint,
        env={
            name: value for name, value in sent.items() if name not in {*OWN_VARIABLES, *UV_VARIABLES, RESUME_VARIABLE}
        },
        needs=checked(needs, address=address, insecure=insecure, say=say),
        resume=row.resume,
        insecure=insecure,
        say=say,
    )


def _refuse_secrets(command: str, recipe_yaml: str, env: Mapping[str, str]) -> None:
    """Raise InputError for what looks like a secret: Ray shows all three on the dashboard."""
    for key, value in env.items():
        if SECRET.search(key) or secret_in(value):
            raise InputError(
                f"environment variable {key}: looks like a secret, and the dashboard shows the environment of a job",
                "set it on the cluster's nodes instead (a Kubernetes secret, or the environment of `ray start`)",
            )
    if secret := secret_in(command) or secret_in(recipe_yaml):
        raise InputError(
            f"the job's command or recipe contains an address with {secret}, and the dashboard shows them",
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, PGPASSWORD, or the storage's variables, on the "
            "cluster's nodes",
        )


def to_stderr(line: str) -> None:
    """Print a message for the user to standard error."""
    print(printable(line), file=sys.stderr)
