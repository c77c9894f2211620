"""Ray for the length of one run: started privately on this machine, or joined where it already is."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import site
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import ray
from ray._private.authentication import authentication_token_setup

from minitron.environment import environment_variables
from minitron.errors import InputError, MinitronError
from minitron_platform.cluster.packaging import PACKAGES, package_folder, stage_code
from minitron_search.private_ray import private_settings

# Ray adds "/session_<date>_<time>_<microseconds>_<pid>/sockets/plasma_store" to its folder, and Linux allows a socket
# path 107 bytes.
LONGEST_TEMP_DIR = 44
IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the entrypoint of a job

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no telemetry
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a worker that asked for no GPU sees none
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

_local_token = ""


def auth_token() -> str | None:
    """The cluster token, looked up where Ray looks: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token.

    Raises InputError when RAY_AUTH_TOKEN_PATH names a file that cannot be read or is empty.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        try:
            token = Path(path).expanduser().read_text().strip()
        except OSError as error:
            raise InputError(
                f"RAY_AUTH_TOKEN_PATH={path}: {error.strerror}", "point it at the file with the cluster's token"
            ) from error
        if not token:
            raise InputError(f"RAY_AUTH_TOKEN_PATH={path}: the file is empty", "put the cluster's token in it")
        return token
    default = Path.home() / ".ray" / "auth_token"
    return (default.read_text().strip() or None) if default.is_file() else None


@contextmanager
def ray_session(
    address: str | None,
    *,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    memory: int | None = None,
    object_store_memory: int | None = None,
    temp_dir: str | None = None,
    keep_logs: str | None = None,
) -> Iterator[None]:
    """Have Ray inside the block and shut it down afterwards.

    address: a running cluster ("auto", "host:6379", "ray://host:10001"). None joins the cluster that RAY_ADDRESS names,
        as it does inside a Ray job; without one, a private Ray is started here: no dashboard, no log lines on the
        terminal, no telemetry, a token of its own.
    num_cpus: the private Ray offers at least this many CPU slots, however few cores there are.
    num_gpus: and this many GPUs; by default those that Ray detects.
    memory, object_store_memory: bytes that it offers to workers, and keeps for objects; by default shares of what is free.
    keep_logs: folder for what workers of the private Ray printed, if the block ends with an error.
    temp_dir: where the private Ray keeps sockets and logs, at most 44 bytes long. Default: a folder that is deleted at
        the end.

    A Ray that is already running in this process is used as it is and left running. When this process is killed, the
    private Ray's workers end within seconds and its two agents, which first try to report to the dead head, within a
    minute.
    Raises InputError for an address or temp_dir that cannot be used, MinitronError if the cluster does not answer.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address is not None and address.startswith(("http://", "https://")):
        raise InputError(
            f"Ray address {address!r}: this is the address of the Jobs API, which takes whole runs",
            "use `minitron submit --address` with it, or unset RAY_ADDRESS to run here",
        )
    with environment_variables(QUIET):
        if address is None or address == "local":
            logging.getLogger("ray").setLevel(logging.ERROR)  # before ray.init warns of the thread that it is called in
            with _private_folder(temp_dir) as folder, environment_variables(_private_settings()):
                ray.init(
                    address="local",
                    num_cpus=max(cores(), num_cpus or 0),
                    num_gpus=num_gpus,
                    object_store_memory=object_store_memory,
                    _memory=memory,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=folder,
                )
                try:
                    yield
                except BaseException:
                    ray.shutdown()
                    if keep_logs is not None:
                        with suppress(OSError):  # the error itself matters more
                            _keep_worker_logs(Path(folder), Path(keep_logs))
                    raise
                finally:
                    ray.shutdown()
        else:
            _join(address)
            try:
                yield
            finally:
                ray.shutdown()


def _keep_worker_logs(ray_folder: Path, target: Path) -> None:
    for log in ray_folder.glob("session_*_*/logs/worker-*"):
        if log.stat().st_size:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(log, target / log.name)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cluster_cpus_gpus() -> tuple[float, float]:
    """CPU and GPU slots of the cluster this process is connected to."""
    resources = ray.cluster_resources()
    return float(resources.get("CPU", 0.0)), float(resources.get("GPU", 0.0))


def _join(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:  # Ray itself tries for more than a minute
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            raise MinitronError(
                f"Ray at {address!r} does not answer ({error.strerror or error})",
                "check the address with `ray status` there; without an address a private Ray is started here",
            ) from error
    # Ray sends its token by itself to a cluster it starts, not to one it joins.
    logging.getLogger(authentication_token_setup.__name__).setLevel(logging.ERROR)
    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    with tempfile.TemporaryDirectory(prefix="minitron-code-") as folder:
        runtime_env = None  # inside a job the code came with the job
        if IN_A_JOB not in os.environ:
            runtime_env = {"py_modules": stage_code(Path(folder)), "env_vars": dict(QUIET)}
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=runtime_env)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise MinitronError(
                f"Ray at {address!r} cannot be joined: {str(error).strip().splitlines()[0]}",
                "check that `ray status` works there and that RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH holds its token; "
                "without an address a private Ray is started here",
            ) from error


def _private_settings() -> dict[str, str]:
    """Environment of a private Ray and its workers."""
    global _local_token
    settings = private_settings()
    if auth_token() is None:
        # Ray would write a lasting token into the home folder. One per process, because Ray caches the first it reads.
        _local_token = _local_token or secrets.token_hex(32)
        settings["RAY_AUTH_TOKEN"] = _local_token
    # Workers see installed packages by themselves; those found through sys.path alone need to be pointed at.
    # Never site-packages: on PYTHONPATH it would come before the standard library.
    installed = {Path(path).resolve() for path in [*site.getsitepackages(), site.getusersitepackages()]}
    parents = dict.fromkeys(package_folder(name).parent for name in PACKAGES)
    paths = [str(parent) for parent in parents if parent not in installed]
    if paths:
        settings["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    return settings


@contextmanager
def _private_folder(temp_dir: str | None) -> Iterator[str]:
    if temp_dir is not None:
        folder = os.path.abspath(temp_dir)
        if len(os.fsencode(folder)) > LONGEST_TEMP_DIR:
            raise InputError(
                f"Ray's folder {folder}: {len(os.fsencode(folder))} bytes, and {LONGEST_TEMP_DIR} is the most that "
                "leaves room for socket names",
                "choose a shorter path, for example /tmp/ray",
            )
        os.makedirs(folder, mode=0o700, exist_ok=True)
        yield folder
        return
    parent = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="mt-", dir=parent if len(os.fsencode(parent)) <= LONGEST_TEMP_DIR - 14 else "/tmp")
    # A process that outlives this one by a moment deletes the folder, so that a killed run leaves nothing either.
    delete = ["sh", "-c", 'cat >/dev/null; rm -rf "$1"', "sh", folder]
    with subprocess.Popen(delete, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True):
        yield f"{folder}/r"  # Ray opens its own folder to everybody, so it gets one inside ours
