"""`minitron cluster render ray-up` and `skypilot`: files that Ray's autoscaler and SkyPilot take."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from helpers.command import minitron_here
from ray.autoscaler._private.util import prepare_config, validate_config

from minitron_platform import load_recipe

NODES = ("--nodes", "4", "--gpus", "8", "--image", "registry.example.com/minitron:0.1")
AWS = ("--cloud", "aws", "--region", "us-east-1", "--disk-image", "ami-0123456789abcdef0")
GCP = (
    "--cloud",
    "gcp",
    "--region",
    "us-central1",
    "--zone",
    "us-central1-a",
    "--project",
    "mine",
    "--disk-image",
    "image",
)
PLACES = ("--storage", "s3://bucket/minitron", "--tracking-uri", "http://mlflow:5000")


def _render(cwd, *options):
    done = minitron_here("cluster", "render", *options, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


@pytest.mark.parametrize("cloud", [AWS, GCP], ids=["aws", "gcp"])
def test_the_files_of_ray_up_are_valid_by_rays_own_schema(tmp_path, cloud):
    config = _render(tmp_path, "ray-up", *cloud, *NODES, *PLACES)
    validate_config(prepare_config(config))
    head, worker = (config["available_node_types"][name] for name in (config["head_node_type"], "worker"))
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert (worker["resources"]["GPU"], worker["min_workers"], worker["max_workers"]) == (8, 0, 4)
    assert config["max_workers"] == 4
    if cloud is AWS:  # Ray's default has a driver that is too old
        assert {node["node_config"]["ImageId"] for node in config["available_node_types"].values()} == {AWS[-1]}
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "RAY_AUTH_MODE=token ray start" in config[commands][-1]
    assert "-e MINITRON_STORAGE=s3://bucket/minitron" in config["docker"]["run_options"]


def test_the_file_of_skypilot_is_valid_by_its_schema_and_runs_the_recipe_on_all_nodes(tmp_path):
    task = _render(tmp_path, "skypilot", *NODES, *PLACES, "--recipe", "minimal", "--set", "distill.steps=7", "--spot")
    schema = json.loads((Path(__file__).parent / "schemas" / "skypilot-0.14.json").read_text())["$defs"]
    jsonschema.validate(task, schema["task"])
    jsonschema.validate(task["resources"], schema["resources"])
    assert (task["num_nodes"], task["resources"]["accelerators"], task["resources"]["use_spot"]) == (4, "H100:8", True)
    _, recipe, command = task["run"].split("END-OF-RECIPE")
    (tmp_path / "recipe.yaml").write_text(recipe.removeprefix("'\n"))
    assert load_recipe(tmp_path / "recipe.yaml") == load_recipe("minimal", ["distill.steps=7"])
    assert command.split()[:3] == ["minitron", "cluster", "launch"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("ray-up", *AWS, *NODES, "--gpus", "4"), "--gpus 4"),
        (("ray-up", *AWS, *NODES, "--zone", "us-east-1a"), "--zone is not for --cloud aws"),
        (("ray-up", *GCP[:6], *GCP[8:], *NODES), "--project is missing for --cloud gcp"),
        (("ray-up", *AWS[:2], "--region", "a: b", *AWS[4:], *NODES), "--region a: b"),
        (("ray-up", *AWS[:4], "--disk-image", "ubuntu", *NODES), "--disk-image ubuntu: not an AMI"),
        (("ray-up", *AWS[:2], "--region", "us-east-1a", *AWS[4:], *NODES), "--region us-east-1a: not a region of aws"),
        (("ray-up", *GCP[:4], "--zone", "us-east1-b", *GCP[6:], *NODES), "--zone us-east1-b: not a zone of the region"),
        (("ray-up", *AWS, *NODES, "--storage", "/mnt/minitron"), "share no folder"),
        (("skypilot", *NODES, *PLACES, "--recipe", "minimal", "--gpu", "H 100"), "--gpu H 100"),
        (("skypilot", *NODES, "--storage", "/mnt/minitron", "--recipe", "minimal"), "share no folder"),
        (("slurm", *NODES[:4], "--storage", "/mnt/minitron", "--recipe", "minimal", "--time", "soon"), "--time soon"),
        (("slurm", *NODES[:4], "--storage", "/mnt/minitron", "--recipe", "minimal", "--time", "1:99"), "--time 1:99"),
        (("slurm", *NODES[:4], "--storage", "/mnt/minitron", "--recipe", "minimal", "--time", "0:00"), "--time 0:00"),
        (
            ("slurm", *NODES[:4], "--storage", "/mnt/minitron", "--recipe", "minimal", "--partition", "a b"),
            "--partition a b",
        ),
        (("slurm", *NODES[:4], "--storage", "/mnt/minitron", "--recipe", "missing.yaml"), "missing.yaml"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, options, problem):
    done = minitron_here("cluster", "render", *options, cwd=tmp_path)
    assert done.returncode == 2
    assert problem in done.stderr
