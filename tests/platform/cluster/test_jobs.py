"""What is refused before a job is submitted, the script that starts a head, and the private Ray of a local run."""

from __future__ import annotations

import json
import os
import py_compile
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray
from helpers.command import ROOT, minitron_here
from helpers.serving import serving
from helpers.submitting import PLACES, RECIPE, TOKEN, Checkout, copy_packages, wait_until

from minitron.errors import InputError, MinitronError
from minitron_platform.addresses import free_ports
from minitron_platform.cluster import packaging
from minitron_platform.cluster.job_start import entrypoint_for
from minitron_platform.cluster.job_start import submit_text as submit
from minitron_platform.cluster.jobs import status
from minitron_platform.cluster.jobs_api import connect
from minitron_platform.cluster.packaging import PACKAGES, code_hash, package_folder, stage_code


@pytest.fixture
def without_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment without a cluster token."""
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return copy_packages(tmp_path)


def test_the_command_of_a_run_survives_quoting_for_any_value() -> None:
    command = entrypoint_for("recipe.yaml", {"storage": "s3://b/a b", "tracking-uri": "x;rm -rf $HOME"}, ["a.b='c d'"])
    program = "import sys, json; print(json.dumps(sys.argv[1:]))"
    words = subprocess.run(
        ["sh", "-c", command.replace("python -m minitron_platform", f"{sys.executable} -c '{program}'", 1)],
        capture_output=True,
        check=True,
    ).stdout
    assert json.loads(words) == [
        *("run", "recipe.yaml", "--storage", "s3://b/a b", "--tracking-uri", "x;rm -rf $HOME", "--set", "a.b='c d'")
    ]


@pytest.mark.parametrize("address", ["ray://10.0.0.1:10001", "auto", "10.0.0.1:8265", "10.0.0.1:6379", "http://"])
def test_addresses_that_are_not_of_the_jobs_api_are_refused(address: str) -> None:
    with pytest.raises(InputError, match="Jobs API") as refusal:
        submit(RECIPE, name="run", address=address)
    assert "http://HOST:8265" in refusal.value.remedy


@pytest.mark.usefixtures("without_token")
def test_an_unencrypted_head_on_another_machine_is_refused_unless_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = f"http://0.0.0.0:{free_ports(1)[0]}"  # not a loopback address, and nothing listens there
    with pytest.raises(InputError, match="no cluster token"):
        submit(RECIPE, name="run", address=elsewhere)
    with monkeypatch.context() as token:
        token.setenv("RAY_AUTH_TOKEN", TOKEN)
        with pytest.raises(InputError, match="without encryption") as refusal:
            submit(RECIPE, name="run", address=elsewhere)
        assert TOKEN not in str(refusal.value)
        with pytest.raises(MinitronError, match="no answer"):
            submit(RECIPE, name="run", address=elsewhere.replace("http", "https"))
        with pytest.raises(MinitronError, match="no answer"):
            submit(RECIPE, name="run", address=elsewhere, insecure=True)
    with pytest.raises(MinitronError, match="no answer"):
        submit(RECIPE, name="run", address=elsewhere, insecure=True)


def test_a_head_that_is_down_or_does_not_answer_is_an_error(without_token: None) -> None:
    with pytest.raises(MinitronError, match="no answer"):
        status(f"http://127.0.0.1:{free_ports(1)[0]}")
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(MinitronError, match="no answer"):
        status(f"http://127.0.0.1:{silent.getsockname()[1]}")


class JobsApi(BaseHTTPRequestHandler):
    """Stands for a head, of which it tells the version."""

    def do_GET(self) -> None:
        self._send(200, {"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""})

    def _send(self, code: int, content: object) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write((content if isinstance(content, str) else json.dumps(content)).encode())

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_a_head_that_cannot_start_jobs_yet_is_asked_again(without_token: None) -> None:
    answers = [
        (500, "No available agent to submit job, please try again later.."),
        (200, {"job_id": "first", "submission_id": "first"}),
    ]

    class Head(JobsApi):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._send(*answers.pop(0))

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Head)) as head:
        client = connect(f"http://127.0.0.1:{head.server_port}", insecure=False)
        assert client.submit_job(entrypoint="true") == "first"
    assert not answers


def test_a_run_whose_log_cannot_be_read_does_not_hide_the_others(without_token: None, tmp_path: Path) -> None:
    """As that of a run whose node is gone, or that has printed bytes that are no UTF-8."""
    names = ("waiting", "whole", "broken")

    def job(name: str) -> dict[str, object]:
        known = {"type": "SUBMISSION", "entrypoint": "true", "metadata": {"minitron.run": name}}
        known |= {"status": "PENDING", "message": "no CPUs"} if name == "waiting" else {"status": "RUNNING"}
        return {**known, "submission_id": f"{name}-0-a1", "start_time": 1000 + names.index(name)}

    class Head(JobsApi):
        def do_GET(self) -> None:
            if self.path.endswith("/broken-0-a1/logs"):
                self._send(500, "Traceback (most recent call last):\n  File …\nUnicodeDecodeError: byte 0xff\n.")
            elif self.path.endswith("/logs"):
                self._send(200, {"logs": "✓ teacher  done\n" if "whole" in self.path else ""})
            elif self.path.endswith("/jobs/"):
                self._send(200, [job(name) for name in names])
            else:
                super().do_GET()

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Head)) as head:
        address = f"http://127.0.0.1:{head.server_port}"
        listed = minitron_here("jobs", "--json", "--address", address, cwd=tmp_path)
        log = minitron_here("logs", "broken", "--address", address, cwd=tmp_path)
    broken, whole, waiting = json.loads(listed.stdout)
    assert (whole["job"], whole["stage"], whole["progress"]) == ("whole-0-a1", "teacher", "done")
    assert (waiting["stage"], waiting["progress"]) == ("", "no CPUs")  # as `minitron jobs` shows it
    assert broken["status"] == "RUNNING"
    assert (
        broken["progress"]
        == "its log cannot be read: Request failed with status code 500: UnicodeDecodeError: byte 0xff"
    )
    assert "status code 500: UnicodeDecodeError: byte 0xff\n" in log.stderr


@pytest.mark.parametrize("key", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "my_password", "RAY_AUTH_TOKEN"])
def test_secret_settings_never_enter_a_job(key: str) -> None:
    with pytest.raises(InputError, match=key) as refusal:
        submit(RECIPE, name="run", address="http://127.0.0.1:1", env={"NCCL_DEBUG": "WARN", key: "hunter2"})
    assert "cluster" in refusal.value.remedy
    assert "hunter2" not in str(refusal.value)


SECRET_ADDRESSES = (
    "http://me:hunter2@mlflow",
    "postgresql://me:h@unter2@db/mlflow",
    "postgresql://me:h/hunter2@db/mlflow",
    "postgresql://db/mlflow?user=me&password=hunter2",
    "s3://key:hunter2@bucket/runs",
    "az://container@account.dfs.core.windows.net/runs?sig=hunter2",
)


@pytest.mark.parametrize("address", SECRET_ADDRESSES)
def test_a_secret_inside_an_address_never_enters_a_job(address: str) -> None:
    for arguments in (
        {"options": {"tracking-uri": address}},
        {"overrides": [f"data.path={address}"]},
        {"env": {"STORE": address}},
    ):
        with pytest.raises(InputError, match="dashboard shows") as refusal:
            submit(RECIPE, name="run", address="http://127.0.0.1:1", **arguments)
        assert "unter2" not in str(refusal.value)
    for jobs_api in (address, f"http://127.0.0.1:1/?token={'hunter2'}"):
        with pytest.raises(InputError, match=r"Jobs API|with a user or a query") as refusal:
            submit(RECIPE, name="run", address=jobs_api)
        assert "unter2" not in str(refusal.value)


@pytest.mark.parametrize("name", ["", "Run", "a/b", "../x", "a" * 65, "a b"])
def test_invalid_run_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="not a valid run name"):
        submit(RECIPE, name=name, address="http://127.0.0.1:1")


def test_a_missing_token_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/no/such/file")
    with pytest.raises(InputError, match="RAY_AUTH_TOKEN_PATH=/no/such/file"):
        status("http://127.0.0.1:1")


@pytest.fixture
def short_path() -> Iterator[Path]:
    """An empty folder whose path is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="mh-", dir="/tmp") as folder:
        yield Path(folder)


def own_ports() -> list[str]:
    """Options of start-head.sh: ports at which no other Ray of this machine listens."""
    options = ("--port", "--dashboard-port", "--ray-client-server-port")
    return [word for pair in zip(options, map(str, free_ports(3)), strict=True) for word in pair]


def test_a_head_listens_on_loopback_and_keeps_its_session_where_no_other_user_can_enter(short_path: Path) -> None:
    """Ray gives its session folder, with the code of jobs, the mode 0777."""
    (short_path / "checkout/clusters/local").mkdir(parents=True)
    script = shutil.copy(ROOT / "clusters/local/start-head.sh", short_path / "checkout/clusters/local")
    (short_path / "bin").mkdir()
    echo = '[ "$1" = start ] && echo "$@" cluster="$RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"'
    (short_path / "bin/ray").write_text(f"#!/bin/sh\n{echo}\nexit 0")
    (short_path / "bin/ray").chmod(0o755)

    def start(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{short_path}/bin:{os.environ['PATH']}", "MINITRON_RAY_FOLDER": str(folder)}
        return subprocess.run(
            [script, *options, *own_ports(), "--block"], env=environment, capture_output=True, text=True
        )

    started = start(short_path / "new")
    assert f"--temp-dir {short_path}/new/r" in started.stdout, started.stderr
    assert (short_path / "new").stat().st_mode & 0o777 == 0o700
    # which makes a private Ray listen on the loopback interface alone: see the test of that name
    assert started.stdout.endswith("cluster=0\n")
    opened = start(short_path / "new", "--num-cpus", "1", "--address", "127.0.0.2")
    assert "--node-ip-address 127.0.0.2 " in opened.stdout
    assert opened.stdout.endswith("--block cluster=\n")
    assert "--num-cpus 1" in opened.stdout
    assert "--address" not in opened.stdout
    (short_path / "link").symlink_to(short_path / "new")
    (short_path / "planted").mkdir()
    (short_path / "planted").chmod(0o777)
    for planted in ("link", "planted"):
        refused = start(short_path / planted)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "is not yours alone" in refused.stderr


def test_a_head_without_the_token_that_its_environment_names_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(ROOT / "clusters/local/start-head.sh")],
        env={**os.environ, "RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert f"error: RAY_AUTH_TOKEN_PATH={tmp_path}/none: no such file" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_local_head_ends_alone(short_path: Path) -> None:
    """`ray stop` would end every Ray of this user."""
    (short_path / "ray").write_text(
        "#!/bin/sh\n[ $1 = start ] || exit 0\necho $*\necho Ray runtime started\nwhile sleep 1; do :; done\n"
    )
    (short_path / "ray").chmod(0o755)

    def script(name: str, folder: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{short_path}:{os.environ['PATH']}", "MINITRON_RAY_FOLDER": str(short_path / folder)}
        (short_path / "bin").mkdir(exist_ok=True)
        copy = shutil.copy(
            ROOT / "clusters/local" / name, short_path / "bin"
        )  # outside the checkout, which may have a .venv
        options = own_ports() if name == "start-head.sh" else []
        return subprocess.run([copy, *options], env=environment, capture_output=True, text=True, timeout=60)

    def is_running(folder: str) -> bool:
        shown = subprocess.run(["ps", "-ww", "-eo", "command="], capture_output=True, text=True, check=True)
        return f" --temp-dir {short_path / folder}/r " in shown.stdout

    assert script("start-head.sh", "mine").returncode == 0
    assert script("start-head.sh", "other").returncode == 0
    try:
        twice = script("start-head.sh", "mine")
        assert twice.returncode == 2
        assert "error: a head runs already" in twice.stderr
        assert "has ended" in script("stop-head.sh", "mine").stdout
        assert not is_running("mine")
        assert is_running("other")
        again = script("stop-head.sh", "mine")
        assert (again.returncode, again.stdout) == (1, "")
    finally:
        assert "has ended" in script("stop-head.sh", "other").stdout


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--port", "TAKEN"], "--port TAKEN: Address already in use"),
        (["--dashboard-port=TAKEN"], "--dashboard-port TAKEN: Address already in use"),
        (["--ray-client-server-port", "TAKEN"], "--ray-client-server-port TAKEN: Address already in use"),
        (["--port", "70000"], "--port 70000: not a port"),
        (["--dashboard-port", "many"], "--dashboard-port many: not a port"),
        (["--port", "FREE", "--dashboard-port", "FREE"], "the same port"),
        (["--port", "FREE", "--min-worker-port", "1024", "--max-worker-port", "65535"], "contain FREE"),
        (["--address", "192.0.2.250"], "--address 192.0.2.250: not an address of this machine"),
        (["--bogus"], "Ray did not start: Error: No such option '--bogus'"),
    ],
)
def test_what_a_head_cannot_start_with_is_one_error(short_path: Path, options: list[str], problem: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        names = {"TAKEN": str(server.getsockname()[1]), "FREE": str(free_ports(1)[0])}
        for name, port in names.items():
            options = [option.replace(name, port) for option in options]
            problem = problem.replace(name, port)
        done = subprocess.run(
            [ROOT / "clusters/local/start-head.sh", *own_ports(), *options],
            env={
                **os.environ,
                "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
                "HOME": str(short_path),
                "MINITRON_RAY_FOLDER": f"{short_path}/r",
            },
            capture_output=True,
            text=True,
        )
    assert done.returncode == 2
    assert problem in done.stderr
    assert "\n  fix: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (short_path / "r/head.pid").exists()


def test_a_link_out_of_a_package_is_not_sent_to_a_cluster(checkout: Checkout, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "id_rsa").write_text("private")
    (checkout.root / "minitron" / "helper.py").symlink_to(tmp_path / "id_rsa")
    monkeypatch.setattr(packaging, "package_folder", lambda package: checkout.root / PLACES[package] / package)
    with pytest.raises(InputError, match=r"helper\.py: a link out of the package"):
        stage_code(tmp_path / "sent")
    (checkout.root / "minitron" / "helper.py").unlink()
    (checkout.root / "minitron" / "helper.py").symlink_to("files.py")
    staged = Path(stage_code(tmp_path / "again")[0])
    assert not (staged / "helper.py").is_symlink()


def test_code_is_identified_by_its_content(tmp_path: Path) -> None:
    py_compile.compile(str(package_folder("minitron") / "errors.py"))  # creates a __pycache__, which must not be sent
    staged = stage_code(tmp_path / "a")
    assert [Path(folder).name for folder in staged] == list(PACKAGES)
    assert not list(tmp_path.rglob("__pycache__"))
    assert (tmp_path / "a/minitron_platform/_data/clusters/local/start-head.sh").is_file()
    again = stage_code(tmp_path / "b")
    assert code_hash(staged) == code_hash(again)
    (tmp_path / "b/minitron_search/__init__.py").write_text("x = 1\n")
    assert code_hash(staged) != code_hash(again)


def test_no_shell_is_between_ray_and_a_run() -> None:
    """Ray took a run for failed whose shell was killed, and the run went on."""
    command = entrypoint_for("recipe.yaml", {}).replace(
        "python -m minitron_platform run recipe.yaml", "ps -o comm= -p $$"
    )
    shown = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "ps"


SESSION = """
import json, os, psutil, sys
import ray
from minitron_platform.cluster.ray_session import ray_session

def seen():
    import minitron, minitron_search, minitron_platform
    return [minitron.__file__, os.getpid()]

with ray_session(None, num_cpus=64):
    node = ray._private.worker.global_worker.node
    file, worker = ray.get(ray.remote(seen).remote())
    raylet = node.all_processes["raylet"][0].process.pid
    pids = [worker, raylet, *(each.pid for each in psutil.Process().children(recursive=True))]
    print(json.dumps([ray.cluster_resources()["CPU"], file, pids, node.get_session_dir_path()]), flush=True)
    sys.stdin.readline()
tasks = os.listdir("/proc/self/task")
named = [open(f"/proc/self/task/{task}/comm").read().strip() for task in tasks]
print(json.dumps([ray.is_initialized(), named.count("python")]), flush=True)
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("end", ["in order", "killed"])
def test_a_local_run_has_a_private_ray_that_leaves_nothing_behind(end: str, tmp_path: Path) -> None:
    # packages that are on sys.path alone, as in a checkout that is not installed
    for package in PACKAGES:
        shutil.copytree(package_folder(package), tmp_path / "code" / package)
    (tmp_path / "run").mkdir()
    (tmp_path / "home").mkdir()
    driver = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'code')!r})\n" + SESSION],
        env={**{k: v for k, v in os.environ.items() if not k.startswith("RAY_")}, "HOME": str(tmp_path / "home")},
        cwd=tmp_path / "run",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert driver.stdin is not None
    assert driver.stdout is not None
    assert driver.stderr is not None
    try:
        cpus, file, pids, session = json.loads(driver.stdout.readline())
        assert cpus == 64
        assert file == str(tmp_path / "code/minitron/__init__.py")
        assert all(map(is_alive, pids[:2]))
        assert len(set(pids)) >= 5
        folder = Path(session).parents[1]
        assert folder.stat().st_mode & 0o077 == 0  # only this user can read sockets and logs
        if end == "killed":
            driver.kill()
        else:
            driver.stdin.write("\n")
            driver.stdin.flush()
            # of Python's threads and those that Ray gives no name, one of which would go on sending metrics to the dead Ray
            assert json.loads(driver.stdout.readline()) == [False, 1]
            assert driver.stderr.read() == ""  # Ray prints nothing
            assert driver.wait() == 0
        wait_until(lambda: not any(map(is_alive, pids)), "all processes of the private Ray are gone", seconds=20)
        wait_until(lambda: not folder.exists(), "the folder of sockets and logs is gone")
        assert list((tmp_path / "home").iterdir()) == []  # no token file is left
    finally:
        driver.kill()
        driver.wait()
