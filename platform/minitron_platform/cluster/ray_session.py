"""Ray for the duration of a run: a private Ray on this machine, or a connection to a running cluster."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import site
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

import ray
from ray._private import ray_constants
from ray._private.node import Node
from ray._private.services import canonicalize_bootstrap_address

from minitron.device import cores
from minitron.environment import environment_variables
from minitron.errors import InputError, MinitronError
from minitron.replaced import replaced
from minitron_platform.addresses import check_ray_address
from minitron_platform.cluster.head_check import PRIVATE, check_head, send_token
from minitron_platform.cluster.no_agents import no_agents
from minitron_platform.cluster.nodes_at import check_answers, listens_at_loopback_alone
from minitron_platform.cluster.packaging import PACKAGES, package_folder, stage_code
from minitron_platform.cluster.tokens import auth_token
from minitron_platform.cluster.waiting import waiting
from minitron_platform.workers.workers import SEAT
from minitron_search.private_ray import private_settings
from minitron_search.shutdown import shutdown_ray

# Ray appends "/session_<date>_<time>_<microseconds>_<pid>/sockets/plasma_store" to its folder, and the path of a socket may
# have at most 107 bytes on Linux.
LONGEST_TEMP_DIR = 44
METRICS_PORT = "MINITRON_METRICS_PORT"  # environment variable: where a private Ray serves its metrics
OPEN_TELEMETRY = "RAY_enable_open_telemetry"  # environment variable of Ray: whether metrics are sent with OpenTelemetry
IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # environment variable that Ray sets for the entrypoint of a job

SEES_NO_GPU = (
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"  # environment variable of Ray: whether a worker with num_gpus=0 sees no GPU
)

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no telemetry
    SEES_NO_GPU: "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

# methods that start what a private Ray does not need
UNUSED = ("start_monitor", "start_log_monitor", "start_api_server")

_local_token = ""


@contextmanager
def ray_session(
    address: str | None,
    *,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    memory: int | None = None,
    object_store_memory: int | None = None,
    seats: int = 0,
    keep_logs: str | None = None,
) -> Iterator[None]:
    """Connect to Ray, or start a private one, for the duration of the block, and shut it down afterwards.

    address: of a running cluster ("auto", "host:6379", "ray://host:10001"). None uses the cluster in RAY_ADDRESS, which Ray
        sets inside a job; if that is not set either, a private Ray is started on this machine, without dashboard, telemetry
        and log lines on the terminal, with a token of its own, and at the loopback interface alone. Its actors and tasks have
        the environment of this process, and can have no runtime environment.
    num_cpus: number of CPU slots that the private Ray has at least, even if the machine has fewer cores.
    num_gpus: number of GPUs that it has; by default those that Ray detects.
    memory, object_store_memory: bytes for workers and for the object store; by default Ray's shares of the free memory.
    seats: number of workers of a private Ray that wait while others have its CPUs, see `minitron_platform.workers`.
    keep_logs: folder for the output of the private Ray's workers if the block ends with an error.

    If Ray is already initialized in this process, it is used as it is and left running. When this process is killed, the
    private Ray's processes end within seconds.
    Raises InputError for an address that cannot be used, MinitronError if the cluster does not answer.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or None
    check_ray_address(address)
    with environment_variables(QUIET):
        if address is None or address == "local":
            logging.getLogger("ray").setLevel(logging.ERROR)  # ray.init warns if it is called outside the main thread
            with private_folder() as folder, environment_variables(_private_settings()), _agents_where_needed():
                with _one_small_node(), _plain_workers(), _signals_kept(), _start_errors():
                    ray.init(
                        address="local",
                        num_cpus=max(cores(), num_cpus or 0),
                        num_gpus=num_gpus,
                        object_store_memory=object_store_memory,
                        _memory=memory,
                        resources={SEAT: seats} if seats else None,
                        labels=PRIVATE,
                        include_dashboard=False,
                        _metrics_export_port=_metrics_port(),
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                        _temp_dir=folder,
                        _skip_env_hook=True,
                    )
                try:
                    yield
                except BaseException:
                    shutdown_ray()
                    if keep_logs is not None:
                        with suppress(OSError):  # must not replace the error that ended the block
                            _keep_worker_logs(Path(folder), Path(keep_logs))
                    raise
                finally:
                    shutdown_ray()
        else:
            _join(address)
            try:
                yield
            finally:
                shutdown_ray()


def head_address(address: str | None) -> str:
    """HOST:PORT of the head of the cluster that this process has joined with `ray_session(address)`."""
    given = address or os.environ.get("RAY_ADDRESS", "")
    return given.removeprefix("ray://") if given.startswith("ray://") else ray.get_runtime_context().gcs_address


def _keep_worker_logs(ray_folder: Path, target: Path) -> None:
    """Copy the workers' logs that are not empty to `target`."""
    for log in ray_folder.glob("session_*_*/logs/worker-*"):
        if log.stat().st_size:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(log, target / log.name)


def _join(address: str) -> None:
    """Connect to a running cluster."""
    check_answers(address)
    at_loopback = listens_at_loopback_alone(address)
    if address.startswith("ray://"):
        send_token()
    elif head := address if at_loopback else canonicalize_bootstrap_address(address):
        check_head(head, address)
    with tempfile.TemporaryDirectory(prefix="minitron-code-") as folder:
        runtime_env = None  # a job has brought its code with it
        if IN_A_JOB not in os.environ:
            runtime_env = {"py_modules": stage_code(Path(folder)), "env_vars": dict(QUIET)}
        try:
            with _at_loopback() if at_loopback else nullcontext(), _signals_kept():
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=runtime_env)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            reason = " ".join(str(error).split())
            if reason.startswith("Version mismatch: "):
                raise MinitronError(
                    f"Ray at {address!r} cannot be joined: {reason.removeprefix('Version mismatch: ')}",
                    "use these versions here, or `minitron submit`: the run's own process is then on the cluster",
                ) from error
            raise MinitronError(
                f"Ray at {address!r} cannot be joined: {reason[:500]}",
                "check that `ray status` works on the cluster and that RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH has its token; "
                "or leave the address out for a private Ray on this machine",
            ) from error


def _metrics_port() -> int | None:
    """The port at which a private Ray serves its metrics, from the environment; None for any."""
    text = os.environ.get(METRICS_PORT)
    if not text:
        return None
    if not text.isdecimal() or not 1024 <= int(text) <= 65535:
        raise InputError(f"{METRICS_PORT}={text!r}: not a port", "set it to a number from 1024 to 65535, or unset it")
    try:  # Ray would wait half a minute for its node, and not say why
        socket.create_server(("127.0.0.1", int(text))).close()
    except OSError as error:
        raise InputError(
            f"{METRICS_PORT}={text}: {error.strerror}", "set it to a free port, each run on this machine to its own"
        ) from error
    return int(text)


def _private_settings() -> dict[str, str]:
    """Environment variables for a private Ray and its workers."""
    global _local_token
    settings = private_settings()
    if not os.environ.get(METRICS_PORT):
        # By default each start of Ray in a process leaves a C++ thread, which sends metrics to agents that have ended (seen in
        # Ray 2.60 with gdb). The older way of sending them leaves none, but goes on serving those of ended trials.
        settings[OPEN_TELEMETRY] = os.environ.get(OPEN_TELEMETRY, "0")
    if _local_token or auth_token() is None:
        # Otherwise Ray would write a token into the home folder. One per process, because Ray caches the first one: a file that
        # another program writes there meanwhile would be of no use.
        _local_token = _local_token or secrets.token_hex(32)
        settings["RAY_AUTH_TOKEN"] = _local_token
    # Workers find installed packages by themselves; packages that are only on sys.path must be on PYTHONPATH. Never put
    # site-packages there: it would come before the standard library.
    installed = {Path(path).resolve() for path in [*site.getsitepackages(), site.getusersitepackages()]}
    parents = dict.fromkeys(package_folder(name).parent for name in PACKAGES)
    paths = [str(parent) for parent in parents if parent not in installed]
    if paths:
        settings["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    return settings


def _agents_where_needed() -> AbstractContextManager[None]:
    """A private Ray's node has its agents if it serves metrics, or if a job has brought a runtime environment."""
    return nullcontext() if os.environ.get(METRICS_PORT) or IN_A_JOB in os.environ else no_agents()


@contextmanager
def _one_small_node() -> Iterator[None]:
    """A Ray that starts inside the context has one node, whose processes listen on the loopback interface alone and are only
    those that a run needs.

    Ray listens there by itself on macOS and Windows; on Linux it would listen on all interfaces. It would also start a
    process that adds nodes, one that copies the workers' output to the driver, and the server of a dashboard without pages:
    together a third of its start.
    """
    with _at_loopback(), replaced(Node, **dict.fromkeys(UNUSED, _nothing)):
        yield


def _plain_workers() -> AbstractContextManager[None]:
    """The workers of a driver that joins Ray inside the context use its Python as it is. Under `uv run`, Ray would start them
    with `uv run` too, in a copy of the current folder."""
    return replaced(ray_constants, RAY_ENABLE_UV_RUN_RUNTIME_ENV=False)


def _at_loopback() -> AbstractContextManager[None]:
    """Inside the context Ray calls this machine 127.0.0.1, and not by its address in the network."""
    return replaced(ray_constants, ENABLE_RAY_CLUSTER=False)


@contextmanager
def _start_errors() -> Iterator[None]:
    """Turn the errors of Ray's start, of which most are plain `Exception`s, into MinitronErrors."""
    try:
        yield
    except Exception as error:
        if type(error) not in (Exception, RuntimeError, TimeoutError):
            raise
        raise MinitronError(
            f"Ray did not start on this machine: {(str(error).strip().splitlines() or ['no reason given'])[0][:300]}",
            "run the command again when the machine is less busy; what was finished is kept",
        ) from error


def _nothing(node: Node, **options: object) -> None:
    """Instead of starting a process."""


@contextmanager
def _signals_kept() -> Iterator[None]:
    """A Ray that is joined inside the context leaves SIGTERM to the handler of this program, if it has one.

    Ray would replace it. It would also print a C++ stack at SIGTERM, and abort the program three seconds later although it is
    closing; with that goes the C++ stack of a crash of this process, of which Python prints its own. Workers keep both.
    """
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with replaced(ray_constants, RAY_DISABLE_FAILURE_SIGNAL_HANDLER=True):
            yield
    finally:
        if threading.current_thread() is threading.main_thread() and handler not in (None, signal.SIG_DFL):
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def private_folder() -> Iterator[str]:
    """A temporary folder for a private Ray's sockets and logs, which is deleted after the block."""
    parent = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="mt-", dir=parent if len(os.fsencode(parent)) <= LONGEST_TEMP_DIR - 14 else "/tmp")
    # Another process deletes the folder when this one ends, so that it is deleted even if this one is killed.
    delete = [*waiting("import shutil; shutil.rmtree(sys.argv[1], ignore_errors=True)"), folder]
    with subprocess.Popen(delete, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True):
        yield f"{folder}/r"  # Ray makes its folder accessible to all users, so it gets one inside ours
