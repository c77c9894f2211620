"""Ray jobs on a real head with token authentication."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import s3fs
from helpers.command import ROOT, minitron_here, run_minitron
from helpers.s3_server import s3_server
from helpers.submitting import RECIPE, TOKEN, Checkout, copy_packages, python_path, wait_until

from minitron.errors import InputError, MinitronError
from minitron_platform import load_recipe
from minitron_platform import submit as submit_recipe
from minitron_platform.addresses import free_ports
from minitron_platform.cluster import jobs
from minitron_platform.cluster.job_start import JobNeeds, checked, resume
from minitron_platform.cluster.job_start import submit_text as submit
from minitron_platform.cluster.jobs import exit_code, logs, status, stop

# On a cluster's nodes Minitron is not installed, only what it needs: its code comes with the job. Nor is what one extra brings.
NOT_INSTALLED = """
import importlib.metadata as metadata

MISSING = ("minitron", "gcsfs")
installed, all_installed = metadata.distribution, metadata.distributions

def distribution(name):
    if name in MISSING:
        raise metadata.PackageNotFoundError(name)
    return installed(name)

def distributions(**context):
    return (found for found in all_installed(**context) if found.name not in MISSING)

metadata.distribution, metadata.distributions = distribution, distributions
"""


@dataclass
class Head:
    address: str
    token_path: str
    folder: Path
    """Home of the head's processes; those of the other node have "node" inside it."""


class Process:
    """A process in a group of its own, which is started again if it ends: Ray gives the agents of a node 15 s to start."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self.command, self.environment, self.log = command, environment, log
        self.starts = 0
        self._start()

    def _start(self) -> None:
        self.starts += 1
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def keep_running(self) -> None:
        """Start it again if it has ended, at most twice."""
        if self.process.poll() is not None:
            assert self.starts < 3, self.log.read_text()
            self._start()

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # it has ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _state(head: Head, what: str) -> list[dict[str, Any]]:
    """Records of Ray's state API."""
    request = urllib.request.Request(
        f"{head.address}/api/v0/{what}?limit=1000&detail=1", headers={"Authorization": f"Bearer {TOKEN}"}
    )
    with urllib.request.urlopen(request) as answer:
        records: list[dict[str, Any]] = json.load(answer)["data"]["result"]["result"]
    return records


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    with s3_server() as settings:
        yield settings


@pytest.fixture(scope="module")
def head(s3: dict[str, str]) -> Iterator[Head]:
    """A head without CPUs for others, started by the shipped script, and a node with two CPUs. Each has a home of its own, and
    is in a process group of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="mj-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        ExitStack() as stack,
    ):
        (Path(folder) / "token").write_text(TOKEN)
        (Path(folder) / "site").mkdir()
        (Path(folder) / "site" / "sitecustomize.py").write_text(NOT_INSTALLED)

        def start(name: str, home: Path, *command: str) -> Process:
            """Start a process that ends with the fixture."""
            home.mkdir(exist_ok=True)
            environment = {
                **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
                **s3,
                "PATH": python_path(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"],
                "PYTHONPATH": os.pathsep.join(filter(None, [f"{folder}/site", os.environ.get("PYTHONPATH")])),
                "HOME": str(home),
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": f"{folder}/token",
                "MINITRON_RAY_FOLDER": f"{folder}/ray",
            }
            process = Process(command, environment, home / f"{name}.log")
            stack.callback(process.kill)
            return process

        with pytest.MonkeyPatch.context() as patch:
            gcs, dashboard, agent, client, node_agent = map(str, free_ports(5))
            head = Head(f"http://127.0.0.1:{dashboard}", f"{folder}/token", Path(folder))
            patch.setenv("RAY_AUTH_TOKEN_PATH", head.token_path)
            script = [str(ROOT / "clusters/local/start-head.sh"), "--address", ray.util.get_node_ip_address()]
            script += ["--block", "--port", gcs, "--dashboard-port", dashboard]
            ports = ["--dashboard-agent-listen-port", agent, "--ray-client-server-port", client]
            first = start("head", head.folder, *script, *ports, "--num-cpus", "0")

            def answers() -> bool:
                first.keep_running()
                try:
                    return status(head.address) == []
                except MinitronError:
                    return False

            wait_until(answers, "the head answers")
            join = ["ray", "start", "--block", "--address", f"127.0.0.1:{gcs}", "--num-cpus", "2"]
            # otherwise it would delete the files of jobs that do not run on it from the head's folder
            join += ["--dashboard-agent-listen-port", node_agent, "--temp-dir", f"{folder}/node/ray"]
            node = start("node", head.folder / "node", *join)

            def joined() -> bool:
                node.keep_running()
                with suppress(OSError):  # the head is busy
                    return "ALIVE" in [
                        record["state"] for record in _state(head, "nodes") if not record["is_head_node"]
                    ]
                return False

            wait_until(joined, "the node with CPUs has joined")
        yield head


@pytest.fixture
def as_user(head: Head, monkeypatch: pytest.MonkeyPatch) -> Head:
    """An environment with the token of the cluster."""
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", head.token_path)
    return head


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return copy_packages(tmp_path)


def test_a_wrong_or_missing_token_is_refused_with_a_remedy(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
    with pytest.raises(MinitronError, match="the head refused the token") as refusal:
        submit(RECIPE, name="run", address=head.address)
    assert "RAY_AUTH_TOKEN_PATH" in refusal.value.remedy
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HOME", str(head.folder / "nobody"))
    with pytest.raises(MinitronError, match="the head requires a token"):
        status(head.address)


def test_a_job_runs_once_at_a_time_and_can_be_followed_and_stopped_by_its_name(
    as_user: Head, checkout: Checkout
) -> None:
    address = as_user.address
    # longer than the 3 s after which Ray kills a job by default
    closing = 'trap "sleep 3.5; echo closed; exit" TERM; '
    entrypoint = closing + 'echo begun; cat recipe.yaml; echo "to resume: $MINITRON_RESUME"; sleep 600'
    typed = "minitron submit mine.yaml --set a=b"
    work = {"address": address, "name": "sleeper", "entrypoint": entrypoint, "resume": typed}
    first, said = checkout.submit(**work)
    assert first.startswith("sleeper-")
    assert first.endswith("-a1")
    assert said == ""
    again, said = checkout.submit(**work | {"resume": "minitron submit ./mine.yaml --set a=b"})
    assert again == first
    assert "nothing was submitted" in said

    lines: list[str] = []
    follower = threading.Thread(target=lambda: lines.extend(logs(address, "sleeper", follow=True)))
    follower.start()
    wait_until(lambda: "begun" in "".join(lines), "the follower sees the first line while the job runs")
    assert status(address, "sleeper")[0].status == "RUNNING"
    assert stop(address, "sleeper") == "STOPPED"
    follower.join(timeout=30)
    assert not follower.is_alive()
    assert "café" in "".join(lines)
    assert f"to resume: {typed}" in "".join(lines)
    assert "closed" in "".join(logs(address, first))
    assert status(address, "sleeper")[0].resume == typed

    second, said = checkout.submit(**work)
    assert second == first.removesuffix("-a1") + "-a2"
    assert said == ""
    assert {row.submission_id for row in status(address) if row.name == "sleeper"} == {first, second}
    assert stop(address, second) == "STOPPED"
    assert stop(address, "sleeper") == "STOPPED"  # no job is active any more, so that the name means the last attempt
    assert exit_code(address, second) == 130

    third = resume(address, second)  # its recipe and command are kept by the cluster; the code is that of this process
    wait_until(lambda: "café" in "".join(logs(address, third)), "the resumed job prints its recipe")
    assert f"to resume: {typed}" in "".join(logs(address, third))
    assert resume(address, third) == third
    assert stop(address, third) == "STOPPED"

    with pytest.raises(InputError, match="no such job") as refusal:
        status(address, "sleepy")
    assert first in refusal.value.remedy
    assert second in refusal.value.remedy


def test_a_run_that_waits_for_room_ends_as_soon_as_it_starts_once_it_was_stopped(
    as_user: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, both = as_user.address, JobNeeds(driver_cpus=2)
    first = submit(RECIPE, name="first", address=address, entrypoint="sleep 600", needs=both)
    wait_until(lambda: status(address, first)[0].status == "RUNNING", "the first job has both CPUs")
    second = submit(RECIPE, name="second", address=address, entrypoint="sleep 600", needs=both)
    with monkeypatch.context() as hasty:
        hasty.setattr(jobs, "STOP_WAIT", 2.0)
        with pytest.raises(MinitronError, match="has not started") as refusal:
            stop(address, second)
    assert "it ends as soon as it starts" in refusal.value.remedy
    assert stop(address, first) == "STOPPED"
    wait_until(lambda: not status(address, second)[0].is_active, "the second job has ended")
    assert status(address, second)[0].status == "STOPPED"


def test_what_has_killed_a_run_is_named_and_a_name_means_the_job_that_was_active(as_user: Head, tmp_path: Path) -> None:
    address = as_user.address

    def minitron(*arguments: str) -> subprocess.CompletedProcess[str]:
        return minitron_here(*arguments, "--address", address, cwd=tmp_path)

    killed = submit(RECIPE, name="several", address=address, entrypoint="exec sh -c 'kill -9 $$'")
    wait_until(lambda: not status(address, killed)[0].is_active, "the job has ended")
    facts = json.loads(minitron("status", killed, "--json").stdout)
    assert facts["status"] == "FAILED"
    assert "killed (SIGKILL)" in facts["reason"]
    assert "no memory" in facts["reason"]
    assert minitron("logs", killed, "--follow").returncode == 128 + signal.SIGKILL

    # the name means the active job, and several ones as soon as that has ended
    submit(RECIPE, name="several", address=address, entrypoint="sleep 5; exit 7")
    assert minitron("logs", "several", "--follow").returncode == 7
    submit(RECIPE, name="several", address=address, entrypoint="sleep 600")
    stopped = minitron("stop", "several")
    assert (stopped.returncode, stopped.stdout) == (0, "STOPPED\n")
    assert "to resume: " in stopped.stderr
    assert "more than one job has this name" in minitron("stop", "several").stderr


def test_what_has_kept_a_cluster_from_its_check_is_not_printed_as_its_findings(as_user: Head, tmp_path: Path) -> None:
    failed = minitron_here("doctor", "--json", "--storage", "/tmp/a?b", "--address", as_user.address, cwd=tmp_path)
    assert (failed.returncode, failed.stdout) == (2, "")  # no JSON, so that a program reads nothing instead of a log
    assert "error: storage '/tmp/a?b': contains '?'" in failed.stderr


def test_a_cluster_that_lacks_a_package_is_refused_before_anything_is_submitted(as_user: Head) -> None:
    with pytest.raises(InputError, match=r"gcsfs is missing, >=[\d.]+ is needed") as refusal:
        checked(JobNeeds("image", extras=("gcs",)), address=as_user.address)
    assert "--env uv" in refusal.value.remedy


def test_a_recipe_that_the_cluster_has_no_room_for_is_refused_before_it_is_submitted(
    as_user: Head, bench: Path
) -> None:
    recipe = load_recipe(bench / "recipe.yaml", ["resources.workers=64", "distill.batch_rows=64"])

    def refused() -> bool:
        with pytest.raises(InputError) as refusal:
            submit_recipe(recipe, address=as_user.address, say=lambda line: None)
        return refusal.value.problem.startswith("resources.workers: 64 need 64 CPUs and 0 GPUs together")

    wait_until(refused, "the node with CPUs has joined")
    with pytest.raises(InputError, match="no such job"):
        status(as_user.address, recipe.name)


DRIVER = """
import ray, minitron, minitron_search
from minitron_platform import marker
from minitron_platform.cluster.ray_session import ray_session

def value():
    from minitron_platform import marker
    return marker.VALUE

with ray_session(None, num_cpus=50):
    there = ray.cluster_resources()
    print("driver", marker.VALUE, "worker", ray.get(ray.remote(value).remote()), (there["CPU"], there.get("GPU", 0.0)))
"""


def test_a_job_runs_the_code_that_was_sent(as_user: Head, checkout: Checkout) -> None:
    """The driver and its workers import the sent packages, and the next job has the edited ones."""
    hashes = []
    for value in ("old", "new"):
        (checkout.root / "platform/minitron_platform/marker.py").write_text(f"VALUE = {value!r}\n")
        submission_id, _ = checkout.submit(as_user.address, "edited", f"python -c {shlex.quote(DRIVER)}")
        wait_until(lambda job=submission_id: not status(as_user.address, job)[0].is_active, "the job has ended")
        row = status(as_user.address, submission_id)[0]
        output = "".join(logs(as_user.address, submission_id))
        assert row.status == "SUCCEEDED", output
        assert f"driver {value} worker {value} (2.0, 0.0)" in output
        hashes.append(row.code)
    assert hashes[0] != hashes[1]


def test_a_recipe_runs_as_a_job_on_a_cluster_whose_head_loads_no_model(
    as_user: Head, s3: dict[str, str], bench: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def minitron(*arguments: str) -> str:
        done = run_minitron(*arguments, cwd=bench)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    files = s3fs.S3FileSystem()
    files.mkdir("runs")
    # relative paths are relative to the folder of the submitter, not of the job
    settings = ["--set", "teacher.model=./teacher", "--set", "data.path=text.jsonl", "--set", "distill.steps=6"]
    settings += ["--set", "family.0.space={num_layers: [4], hidden_size: [36], intermediate_size: [48, 72]}"]
    settings += ["--set", "resources={workers: 1, cpus_per_trial: 2}"]  # one process at a time
    tracking = ["--tracking-uri", f"sqlite:///{as_user.folder}/mlflow.db"]
    printed = minitron(
        "submit",
        "recipe.yaml",
        "--address",
        as_user.address,
        "--storage",
        "s3://runs",
        *settings,
        *tracking,
        "--upload",
        "--follow",
    )
    job = printed.splitlines()[0]
    facts = json.loads(minitron("status", job, "--json", "--address", as_user.address))
    assert (facts["status"], facts["stage"], facts["progress"]) == ("SUCCEEDED", "register", "done"), printed
    for stage in ("teacher", "search", "distill", "register"):
        assert f"✓ {stage}" in printed
    assert files.exists(files.glob("runs/uploads/*/teacher/model.safetensors")[0])
    (results,) = files.glob("runs/runs/*/results.json")
    table = json.loads(files.cat(results))["family"]["tiny-student"]["evaluate"]["table"]
    assert table["distilled"]["kl"] < table["pruned"]["kl"]

    # Ray's records: trials and the workers of all stages ran on the other node
    heads = {node["node_id"]: node["is_head_node"] for node in _state(as_user, "nodes")}
    actors = [actor for actor in _state(as_user, "actors") if actor["node_id"]]
    # (Ray records a trial's class as `ImplicitFunc`, at times with a prefix)
    ran = {(actor["class_name"], heads[actor["node_id"]]) for actor in actors}
    for work in ("RayTrainWorker", "ImplicitFunc"):
        assert {on_head for name, on_head in ran if name.endswith(work)} == {False}, ran
    # the driver did not even copy a model's weights to its node
    assert list((as_user.folder / "node" / ".cache").rglob("model*.safetensors"))
    assert not list((as_user.folder / ".cache").rglob("model*.safetensors"))
