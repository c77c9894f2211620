"""What `minitron doctor` says about a machine with a problem. tests/clusters lets it look at a whole cluster."""

from __future__ import annotations

import json
import resource
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub.constants
import pytest
import ray
from helpers.command import minitron_here
from helpers.serving import serving

from minitron_platform.cluster.ray_session import IN_A_JOB, ray_session
from minitron_platform.cluster.requirements import Environment
from minitron_platform.doctor import examine, services
from minitron_platform.doctor.allreduce import finding as all_reduce_finding
from minitron_platform.doctor.cluster import probe
from minitron_platform.doctor.finding import Finding
from minitron_platform.doctor.node import Gpu, StorageSpeed, node_facts
from minitron_platform.doctor.node_checks import node_findings

GPU = Gpu("NVIDIA H100 80GB HBM3", "570.1", 80 << 30)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return node_facts(str(tmp_path_factory.mktemp("storage")), "")


def _findings(*nodes):
    """The worst finding of each check at each place."""
    return {(each.check, each.where): each for each in node_findings(nodes)}


def test_a_sound_machine_has_no_failures(here):
    assert [each for each in node_findings([here]) if each.state == "failed"] == []


def test_a_low_limit_of_open_files_is_seen(here, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, before[1]))
    try:
        low = node_facts(str(tmp_path), "")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    found = _findings(low)["open files", low.node]
    assert (found.state, found.value) == ("failed", "1,000")
    assert "ulimit -n" in found.remedy


def test_a_storage_that_cannot_be_written_or_is_not_shared_is_seen(here, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    broken = node_facts(str(tmp_path / "file" / "runs"), "")
    found = _findings(broken)["storage", broken.node]
    assert found.state == "failed"
    assert str(tmp_path / "file") in found.value
    assert found.remedy
    alone = node_facts(str(tmp_path), str(tmp_path / "written-by-another-node"))
    found = _findings(alone)["storage", alone.node]
    assert (found.state, found.value) == ("failed", "does not see what other nodes write")
    slow = replace(here, storage=StorageSpeed(write_bytes=1e6, read_bytes=1e6))
    assert _findings(slow)["storage", here.node].state == "warning"


def test_small_shared_memory_and_temporary_space_are_seen(here):
    small = _findings(replace(here, shared_memory_bytes=1 << 20, temp_free_bytes=10**9))
    assert small["shared memory", here.node].state == small["temporary space", here.node].state == "failed"
    assert "--shm-size" in small["shared memory", here.node].remedy
    assert "TMPDIR" in small["temporary space", here.node].remedy


def test_nodes_with_other_versions_or_gpus_are_named(here):
    old = {**here.environment.packages, "torch": "2.1.0", "optuna": "5.0.1"}
    other = replace(here, node="node-2", environment=Environment(here.environment.python, old))
    found = _findings(here, other, replace(here, node="node-3"))
    assert "torch 2.1.0, >=" in found["versions", "node-2"].value
    assert "optuna" in found["versions", "all nodes"].value
    assert "5.0.1 on node-2" in found["versions", "all nodes"].value
    assert found["versions", "all nodes"].state == "failed"
    here = replace(here, visible_gpus=None)
    first = replace(here, gpus=(GPU, GPU), torch_gpus=2, nvlink=False)
    second = replace(here, node="node-2", gpus=(replace(GPU, driver="550.2"),), torch_gpus=0)
    found = _findings(first, second)
    assert found["GPUs", here.node].state == "warning"
    assert "2 NVIDIA H100 80GB HBM3, driver 570.1, no NVLink" in found["GPUs", here.node].value
    assert found["GPUs", "node-2"].state == "failed"
    assert "built for the driver's CUDA" in found["GPUs", "node-2"].remedy
    assert "550.2, 570.1" in found["GPUs", "all nodes"].value


def test_gpus_that_cuda_visible_devices_leaves_out_are_no_failure(here):
    def found(visible, used):
        return _findings(replace(here, gpus=(GPU, GPU, GPU), visible_gpus=visible, torch_gpus=used))["GPUs", here.node]

    few = found("0,GPU-5b1c", 2)
    assert (few.state, few.value.split(", ", 2)[2]) == ("ok", "of which CUDA_VISIBLE_DEVICES='0,GPU-5b1c' leaves 2")
    assert (found(None, 2).state, found(None, 3).state) == ("failed", "ok")
    assert (found("0,7", 1).state, found("0,7", 1).remedy.split(" or ")[0]) == ("failed", "unset CUDA_VISIBLE_DEVICES")
    assert found("MIG-5b1c", 1).state == "ok"
    assert found("", 0).state == "skipped"


def test_the_doctor_of_a_cluster_sees_the_gpus_of_a_node_without_taking_one(tmp_path, monkeypatch):
    monkeypatch.setenv(IN_A_JOB, "{}")  # its Ray has the agents, which probes need
    with ray_session(None, num_cpus=1, num_gpus=1):
        (node,) = (node["NodeID"] for node in ray.nodes())
        probes = [probe(node, sees_gpus=sees) for sees in (True, False)]
        facts = ray.get([each.facts.remote(str(tmp_path), "") for each in probes])
    assert [each.visible_gpus for each in facts] == [None, ""]  # Ray hides the GPUs from processes that have none


@contextmanager
def _refusing_server():
    """A server that refuses every request for the lack of a password; gives its address."""

    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(401)
            self.end_headers()
            self.wfile.write(b"You are not authenticated")

        do_POST = do_GET

        def log_message(self, *arguments):
            pass

    with serving(HTTPServer(("127.0.0.1", 0), Refuse)) as server:
        yield f"http://127.0.0.1:{server.server_port}"


def test_an_mlflow_that_refuses_this_user_has_failed(monkeypatch):
    with _refusing_server() as address:
        found = services.mlflow(address)
    assert (found.check, found.state) == ("MLflow", "failed")
    assert "MLFLOW_TRACKING_PASSWORD" in found.remedy


def test_a_token_that_is_missing_or_readable_by_others_is_seen(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert services.ray_token().state == "failed"
    (tmp_path / "token").write_text("secret")
    (tmp_path / "token").chmod(0o644)
    found = services.ray_token()
    assert (found.state, found.remedy) == ("warning", f"chmod 600 {tmp_path / 'token'}")
    (tmp_path / "token").chmod(0o600)
    assert services.ray_token().state == "ok"


def test_an_all_reduce_without_an_answer_or_with_slow_gpus_is_seen():
    assert all_reduce_finding("all nodes", 2, True, ["1e9", "2e9"], []).state == "warning"
    failed = all_reduce_finding("all nodes", 2, True, ["1e9"], ["", "Traceback\nTimeoutError: rank 1\n"])
    assert (failed.state, failed.value) == ("failed", "NCCL, 2 processes: TimeoutError: rank 1")
    assert "NCCL_SOCKET_IFNAME" in failed.remedy


def test_the_command_prints_remedies_and_says_by_its_exit_code_whether_a_check_failed(tmp_path, monkeypatch):
    bad = Finding("open files", "node-1", "failed", "256", "ulimit -n 65536")
    monkeypatch.setattr(examine, "findings", lambda locations, address: iter([bad]))
    done = minitron_here("doctor", "--storage", tmp_path, cwd=tmp_path)
    assert done.returncode == 1
    assert "fix: ulimit -n 65536" in done.stdout
    done = minitron_here("doctor", "--storage", tmp_path, "--json", cwd=tmp_path)
    assert (done.returncode, json.loads(done.stdout)[0]["state"]) == (1, "failed")
    monkeypatch.setattr(examine, "findings", lambda locations, address: iter([replace(bad, state="warning")]))
    assert minitron_here("doctor", "--storage", tmp_path, cwd=tmp_path).returncode == 0


def test_a_hub_that_does_not_answer_is_a_warning(monkeypatch, free_port):
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.whoami.__self__, "endpoint", f"http://127.0.0.1:{free_port()}")
    finding = services.hub_token()
    assert finding.state == "warning"
    assert finding.value.startswith("the hub does not answer (")
