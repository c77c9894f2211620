"""The files that serve MLflow from PostgreSQL: what can be said of them without a cluster."""

from __future__ import annotations

import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from helpers.manifests import check_manifest
from helpers.postgres_server import refusal

FOLDER = Path(__file__).resolve().parents[3] / "clusters" / "mlflow"


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))


def containers() -> dict[str, dict[str, Any]]:
    workloads = [
        each["spec"]["template"]["spec"] for each in manifests() if each["kind"] in ("StatefulSet", "Deployment")
    ]
    assert all(pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"] for pod in workloads)
    return {container["name"]: container for pod in workloads for container in pod["containers"]}


def test_the_manifests_are_valid_by_the_definitions_of_kubernetes() -> None:
    kinds = [each["kind"] for each in manifests()]
    assert sorted({*kinds}) == [
        "ConfigMap",
        "Deployment",
        "NetworkPolicy",
        "PersistentVolumeClaim",
        "Service",
        "StatefulSet",
    ]
    for manifest in manifests():
        check_manifest(manifest)


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("Deployment", ["spec", "template", "spec", "containers", 0, "startupProbe"]),
        ("StatefulSet", ["spec", "volumeClaimTemplates", 0, "spec"]),
        ("Service", ["spec", "ports", 0]),
        ("PersistentVolumeClaim", ["spec", "resources"]),
    ],
)
def test_a_misspelt_key_of_each_kind_is_not_valid(kind: str, keys: list[Any]) -> None:
    manifest = next(each for each in manifests() if each["kind"] == kind)
    section: Any = manifest
    for key in keys:
        section = section[key]
    section["misspelt"] = 1
    with pytest.raises(jsonschema.ValidationError, match="misspelt"):
        check_manifest(manifest)


def test_services_policies_and_volumes_lead_to_pods_that_exist() -> None:
    workloads = [each for each in manifests() if "template" in each.get("spec", {})]
    pods = {each["metadata"]["name"]: each["spec"]["template"]["spec"] for each in workloads}
    services = {each["metadata"]["name"]: each for each in manifests() if each["kind"] == "Service"}
    assert services.keys() == pods.keys()
    for name, service in services.items():
        assert service["spec"]["selector"] == {"app": name}
        open_ports = [port["containerPort"] for container in pods[name]["containers"] for port in container["ports"]]
        assert [port["port"] for port in service["spec"]["ports"]] == open_ports
    for name, pod in pods.items():
        volumes = {volume["name"] for volume in pod["volumes"]} | ({"data"} if "postgres" in name else set())
        assert {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]} == volumes
    (policy,) = [each["spec"] for each in manifests() if each["kind"] == "NetworkPolicy"]
    assert policy["podSelector"]["matchLabels"]["app"] in pods
    assert policy["ingress"][0]["from"][0]["podSelector"]["matchLabels"]["app"] == "minitron-mlflow"


def test_passwords_come_from_the_secret_alone() -> None:
    secret = {"database-password", "admin-password", "session-key"}
    used = set()
    for container in containers().values():
        for variable in container["env"]:
            if "PASSWORD" in variable["name"] or "SECRET" in variable["name"]:
                used.add(variable["valueFrom"]["secretKeyRef"]["key"])
    assert used == secret
    head = (FOLDER / "kubernetes.yaml").read_text().split("apiVersion")[0]
    assert all(f"--from-literal={key}=" in head for key in secret)
    assert "--app-name basic-auth" in containers()["mlflow"]["args"][0]


def test_mlflows_own_jobs_whose_processes_outlive_the_server_are_off() -> None:
    """Without the setting, a server that was told to stop did not (seen with MLflow 3.17)."""
    assert "export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false" in (FOLDER / "serve.sh").read_text()
    (setting,) = [v for v in containers()["mlflow"]["env"] if v["name"] == "MLFLOW_SERVER_ENABLE_JOB_EXECUTION"]
    assert setting["value"] == "false"


@pytest.mark.parametrize(
    ("words", "variables", "reason"),
    [
        (["--bogus"], {}, "--bogus: there is no such option: give a folder alone"),
        (["HOME/a", "HOME/b"], {}, "more than one folder"),
        (["HOME/with space"], {}, "HOME/with space: give a folder without spaces"),
        (["HOME/" + "x" * 90], {}, "too long for the name of a socket"),
        (["HOME/a"], {"PORT": "many"}, "PORT=many: not a port: give a number from 1 to 65535"),
        (["HOME/a"], {"PORT": "70000"}, "PORT=70000: not a port"),
        (
            ["HOME/a"],
            {"PORT": "TAKEN"},
            "PORT=TAKEN: Address already in use: give an address of this machine and a port",
        ),
        (["HOME/a"], {"HOST": "192.0.2.250"}, "HOST=192.0.2.250 PORT="),
        (["HOME/file"], {}, "HOME/file"),
        (["/proc/minitron"], {}, "give a folder of your own"),
        (["/"], {}, "give a folder of your own"),
    ],
)
def test_the_script_refuses_what_cannot_work_before_it_starts(
    words: list[str], variables: dict[str, str], reason: str
) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="mm-", dir="/tmp") as home,
        socket.create_server(("127.0.0.1", 0)) as taken,
    ):
        (Path(home) / "file").touch()
        names = {"HOME": home, "TAKEN": str(taken.getsockname()[1])}

        def filled(text: str) -> str:
            for name, value in names.items():
                text = text.replace(name, value)
            return text

        variables = {name: filled(value) for name, value in variables.items()}
        said = refusal(*map(filled, words), home=Path(home), **variables)
        assert said.startswith("serve.sh: ")
        assert filled(reason) in said
        assert said.count("\n") == 1
        assert [each.name for each in Path(home).iterdir()] == ["file"]


def test_the_scripts_help_starts_nothing(tmp_path: Path) -> None:
    asked = subprocess.run(["bash", FOLDER / "serve.sh", "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert asked.returncode == 0
    assert "clusters/mlflow/serve.sh [FOLDER]" in asked.stdout
    assert not any(tmp_path.iterdir())


def test_the_server_remembers_for_a_minute_that_a_password_was_right() -> None:
    """Without the setting MLflow compares the password's slow hash several times a request: 0.9 s where 0.01 s are enough."""
    for file in ("serve.sh", "kubernetes.yaml"):
        assert "auth_cache_ttl_seconds = 60" in (FOLDER / file).read_text()
