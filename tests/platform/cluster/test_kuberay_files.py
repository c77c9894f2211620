"""`minitron cluster render kuberay`: manifests that KubeRay and Kubernetes take."""

from __future__ import annotations

import jsonschema
import pytest
import yaml
from helpers.command import minitron_here
from helpers.manifests import check_manifest

CLUSTER = ("--nodes", "4", "--gpus", "8", "--image", "registry.example.com/minitron:0.1")
JOB = (
    "--recipe",
    "llama-3.1-8b-to-4b-h100x8",
    "--storage",
    "s3://bucket/minitron",
    "--tracking-uri",
    "http://mlflow:5000",
)


def _render(cwd, *options):
    """The manifests by kind."""
    done = minitron_here("cluster", "render", "kuberay", *CLUSTER, *options, cwd=cwd)
    assert done.returncode == 0, done.stderr
    manifests = {manifest["kind"]: manifest for manifest in yaml.safe_load_all(done.stdout)}
    for manifest in manifests.values():
        check_manifest(manifest)
    return manifests


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--storage", "/mnt/minitron", "--claim", "shared", "--redis", "redis:6379", "--fabric", "efa"),
        ("--gpus", "0", "--queue", "research"),
        ("--fabric", "rdma", "--node-label", "nvidia.com/gpu.product=NVIDIA-H100-80GB-HBM3", *JOB),
        ("--queue", "research", "--set", "distill.steps=7", *JOB),
    ],
)
def test_manifests_are_valid_by_the_definitions_of_kuberay_and_kubernetes(tmp_path, options):
    manifests = _render(tmp_path, *options)
    main = {"RayJob", "ConfigMap"} if "--recipe" in options else {"RayCluster"}
    assert manifests.keys() == {"NetworkPolicy", "PodDisruptionBudget"} | main


def test_a_misspelt_key_is_not_valid(tmp_path):
    cluster = _render(tmp_path)["RayCluster"]
    cluster["spec"]["workerGroupSpecs"][0]["minReplicaz"] = 0
    with pytest.raises(jsonschema.ValidationError, match="minReplicaz"):
        check_manifest(cluster)


def test_workers_with_gpus_start_from_zero_and_the_head_has_none(tmp_path):
    spec = _render(tmp_path)["RayCluster"]["spec"]
    head, (workers,) = spec["headGroupSpec"], spec["workerGroupSpecs"]
    limits = [group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in (head, workers)]
    assert [limit.get("nvidia.com/gpu") for limit in limits] == [None, 8]
    assert (head["rayStartParams"]["num-cpus"], head["rayStartParams"]["num-gpus"]) == ("0", "0")
    assert spec["enableInTreeAutoscaling"]
    assert [workers[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [0, 0, 4]
    assert sorted(spec["authOptions"].values()) == ["minitron-token", "token"]


def test_kueue_gets_a_fixed_number_of_nodes(tmp_path):
    job = _render(tmp_path, "--queue", "research", *JOB)["RayJob"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    spec = job["spec"]["rayClusterSpec"]
    assert "enableInTreeAutoscaling" not in spec
    assert [spec["workerGroupSpecs"][0][key] for key in ("replicas", "minReplicas", "maxReplicas")] == [4, 4, 4]


@pytest.mark.parametrize(
    ("options", "policies"),
    [
        ((), ["Never", "Never"]),
        (("--queue", "research"), [None, None]),
        (("--queue", "research", *JOB), ["Never", None]),
    ],
)
def test_pods_are_not_restarted_where_the_autoscaler_or_the_submitter_would_lose_them(tmp_path, options, policies):
    manifests = _render(tmp_path, *options)
    spec = (
        manifests["RayCluster"]["spec"] if "RayCluster" in manifests else manifests["RayJob"]["spec"]["rayClusterSpec"]
    )
    groups = (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    assert [group["template"]["spec"].get("restartPolicy") for group in groups] == policies


def test_shared_memory_holds_the_object_store(tmp_path):
    (workers,) = _render(tmp_path)["RayCluster"]["spec"]["workerGroupSpecs"]
    pod = workers["template"]["spec"]
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]
    (volume,) = (volume for volume in pod["volumes"] if volume["name"] == "shared-memory")
    assert volume["emptyDir"]["medium"] == "Memory"
    limit = int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi"))
    assert int(workers["rayStartParams"]["object-store-memory"]) < limit * 1024**3
    assert limit < int(pod["containers"][0]["resources"]["limits"]["memory"].removesuffix("Gi"))


def test_the_network_policy_and_the_disruption_budget_select_the_pods_of_the_cluster(tmp_path):
    manifests = _render(tmp_path, "--name", "mine")
    spec = manifests["RayCluster"]["spec"]
    head, workers = (
        group["template"]["metadata"]["labels"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    )
    policy = manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    assert policy.items() <= head.items()
    assert policy.items() <= workers.items()
    budget = manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]
    assert budget.items() <= head.items()
    assert not budget.items() <= workers.items()


def test_a_job_runs_the_recipe_with_its_settings_in_the_storage(tmp_path):
    manifests = _render(tmp_path, *JOB, "--set", "distill.steps=7")
    job = manifests["RayJob"]["spec"]
    pod = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    environment = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
    assert environment["MINITRON_STORAGE"] == "s3://bucket/minitron"
    assert environment["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    (mount,) = (mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == "recipe")
    (volume,) = (volume for volume in pod["volumes"] if volume["name"] == "recipe")
    recipe = manifests["ConfigMap"]
    assert volume["configMap"]["name"] == recipe["metadata"]["name"]
    assert job["entrypoint"] == f"minitron run {mount['mountPath']}/recipe.yaml"
    (tmp_path / "recipe.yaml").write_text(recipe["data"]["recipe.yaml"])
    from minitron_platform import load_recipe

    assert load_recipe(tmp_path / "recipe.yaml") == load_recipe(JOB[1], ["distill.steps=7"])


REMOTE = ("--storage", "s3://bucket/minitron", "--tracking-uri", "http://mlflow:5000")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--nodes", "0"), "--nodes 0"),
        (("--nodes", "99999999999"), "--nodes 99999999999: too many"),
        (("--recipe", "minimal", *REMOTE, "--set", "resources.workers=640"), "resources.workers: 640 need 640 CPUs"),
        (("--name", "Mine"), "--name Mine"),
        (("--image", "minitron"), "--image minitron"),
        (("--image", "minitron:latest"), "--image minitron:latest"),
        (("--image", "https://example.com/minitron:1"), "--image https://"),
        (("--storage", "s3://"), "--storage: 's3://': names no bucket"),
        (("--storage", "s4://bucket"), "--storage: 's4://bucket': scheme 's4'"),
        (("--storage", "s3:/bucket"), "--storage: 's3:/bucket': an address of s3 has two slashes"),
        (("--tracking-uri", "mlflow:5000"), "--tracking-uri: MLflow tracking address 'mlflow:5000'"),
        (("--tracking-uri", "http://127.0.0.1:5000"), "--tracking-uri http://127.0.0.1:5000: on a node"),
        (("--tracking-uri", "http://[mlflow"), "--tracking-uri http://[mlflow"),
        (("--tracking-uri", "sqlite:///mlflow.db"), "--tracking-uri sqlite:///mlflow.db: a file of one node"),
        (("--redis", "redis:99999"), "--redis redis:99999"),
        (("--storage", "runs"), "--storage runs"),
        (("--storage", "/mnt/minitron"), "--claim"),
        (("--storage", "s3://key:hunter2@bucket/minitron"), "--storage"),
        (("--recipe", "minimal", "--storage", "s3://bucket/minitron"), "--tracking-uri"),
        (("--set", "distill.steps=7"), "--set distill.steps=7"),
        (("--gpus", "0", "--fabric", "efa"), "--fabric efa"),
        (("--queue", "a: b"), "--queue a: b"),
        (("--node-label", "gpu"), "--node-label gpu"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, options, problem):
    done = minitron_here("cluster", "render", "kuberay", *CLUSTER, *options, cwd=tmp_path)
    assert done.returncode == 2
    assert problem in done.stderr
    assert "hunter2" not in done.stderr


def test_workers_that_the_gpus_do_not_suffice_for_are_named(tmp_path):
    options = ("--recipe", "minimal", *REMOTE, "--set", "resources.workers=64")
    done = minitron_here("cluster", "render", "kuberay", *CLUSTER, *options, cwd=tmp_path)
    assert done.returncode == 0
    assert "warning: resources.workers: 64 workers cannot share 32 GPUs, so they train on CPUs" in done.stderr


def test_files_that_were_edited_are_not_overwritten(tmp_path):
    command = ("cluster", "render", "kuberay", *CLUSTER, "--out", "deploy")
    for _ in range(2):
        done = minitron_here(*command, cwd=tmp_path)
        assert done.stdout.split() == [
            f"deploy/{name}.yaml" for name in ("network-policy", "disruption-budget", "cluster")
        ], done.stderr
    (tmp_path / "deploy/cluster.yaml").write_text("mine")
    done = minitron_here(*command, "--nodes", "8", cwd=tmp_path)
    assert done.returncode == 2
    assert "cluster.yaml exists and differs" in done.stderr
    assert (tmp_path / "deploy/cluster.yaml").read_text() == "mine"
