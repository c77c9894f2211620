"""What `submit` refuses before anything is sent to a cluster, and what it leaves to the job."""

from __future__ import annotations

import contextlib
import shutil

import pytest
from helpers.command import minitron_here

from minitron.errors import InputError, MinitronError
from minitron_platform import load_recipe, plan, submit

NO_HEAD = "http://127.0.0.1:1"  # nothing listens there
REFUSED = {
    "contradicting keys": ("distill.warmup_steps=1000", "distill.warmup_steps: 1000 leaves no step"),
    "unknown benchmark": (
        "evaluate.tasks.0.name=arc_eazy",
        "evaluate.tasks.0: task 'arc_eazy': lm-eval has no such task",
    ),
    "documents that are not the benchmark's": ("evaluate.tasks.0.num_fewshot=9", "evaluate.tasks.0: "),
    "relative documents that do not exist": ("evaluate.tasks.0.data=./no.jsonl", "evaluate.tasks.0.data: ./no.jsonl"),
    "relative teacher that does not exist": ("teacher.model=./nowhere", "teacher.model: ./nowhere does not exist"),
    "folder without a model": ("teacher.model=.", " has no config.json"),
    "damaged teacher": ("teacher.model=broken", "broken: config.json cannot be read"),
    "relative text that does not exist": ("data.path=no.jsonl", "data.path: no.jsonl does not exist"),
    "folder without text": ("data.path=empty", "data.path: no files in '/"),
    "rows longer than the teacher accepts": ("data.seq_length=5000", "data.seq_length: 5000"),
    "size that no candidate has": ("family.0.parameters=1000", "family.0.space: no combination"),
    "losses that the targets cannot serve": ("losses.top_k=400", "losses.top_k: 400"),
}


@pytest.fixture
def in_bench(bench):
    (bench / "broken").mkdir(exist_ok=True)
    (bench / "broken" / "config.json").write_text("{not json")
    (bench / "empty").mkdir(exist_ok=True)
    with contextlib.chdir(bench):
        yield


@pytest.mark.usefixtures("in_bench")
@pytest.mark.parametrize("case", REFUSED)
def test_submit_refuses_what_plan_refuses(case, tmp_path):
    override, problem = REFUSED[case]
    recipe = load_recipe("recipe.yaml", [override])
    with pytest.raises(InputError):
        plan(recipe, storage_path=str(tmp_path / "runs"))
    with pytest.raises(InputError) as refused:
        submit(recipe, address=NO_HEAD, storage_path=str(tmp_path / "runs"))
    assert problem in refused.value.problem
    assert refused.value.remedy
    assert not (tmp_path / "runs" / "stages").exists()


def test_the_command_refuses_what_the_function_refuses(bench, tmp_path):
    arguments = ["submit", "recipe.yaml", "--address", NO_HEAD, "--storage", tmp_path]
    refused = minitron_here(*arguments, "--set", "teacher.model=./nowhere", cwd=bench)
    assert refused.returncode == 2
    assert "teacher.model: ./nowhere does not exist" in refused.stderr
    refused = minitron_here(*arguments, "--tracking-uri", "ftp://mlflow", cwd=bench)
    assert refused.returncode == 2
    assert "'ftp://mlflow' is not supported" in refused.stderr


@pytest.mark.usefixtures("in_bench")
def test_what_may_only_be_on_the_cluster_is_left_to_the_job_and_reported(tmp_path):
    elsewhere = {
        "teacher.model": "/cluster/teacher",
        "data.path": "/cluster/text/*.jsonl",
        "evaluate.tasks.0.data": "/cluster/arc",
    }
    overrides = [f"{key}={path}" for key, path in elsewhere.items()]
    said = []

    def submitted(*more):
        recipe = load_recipe("recipe.yaml", [*overrides, *more])
        return submit(recipe, address=NO_HEAD, storage_path=str(tmp_path), say=said.append)

    with pytest.raises(MinitronError, match="no answer"):  # it gets as far as the head
        submitted()
    (line,) = said
    assert all(f"{key}: {path}" in line for key, path in elsewhere.items())
    for override in ("teacher.model=nobody/nothing", "teacher.model=package:nowhere/x.gguf", "data.path=s3://bucket/a"):
        with pytest.raises(MinitronError, match="no answer"):
            submitted(override)
        key, _, value = override.partition("=")
        assert f"{key}: {value}" in said[-1]
    with pytest.raises(InputError, match="lm-eval has no such task"):
        submitted("evaluate.tasks.0.name=arc_eazy")


@pytest.mark.usefixtures("in_bench")
@pytest.mark.parametrize("key", ["teacher.model", "data.path"])
def test_a_link_out_of_a_folder_is_not_uploaded(bench, tmp_path, key):
    """Whoever made a model or a text could otherwise have any file of this user copied to the shared storage."""
    secret = tmp_path / "id.txt"
    secret.write_text('{"text": "private key"}\n')
    if key == "teacher.model":
        folder = shutil.copytree(bench / "teacher", tmp_path / "teacher")
        (folder / "notes.txt").symlink_to(secret)
    else:
        folder = tmp_path / "text"
        folder.mkdir()
        shutil.copy(bench / "text.jsonl", folder)
        (folder / "more.jsonl").symlink_to(secret)
    recipe = load_recipe("recipe.yaml", [f"{key}={folder}"])
    with pytest.raises(InputError, match=r"a link to .*id\.txt.* would be uploaded"):
        submit(recipe, address=NO_HEAD, storage_path=str(tmp_path / "runs"), upload=True, say=lambda line: None)
    assert "private key" not in {file.read_text(errors="replace") for file in tmp_path.glob("runs/**/*.*")}


@pytest.mark.usefixtures("in_bench")
def test_files_of_this_machine_that_another_one_needs_are_named_with_the_remedy(tmp_path):
    said = []

    def submitted(address, **options):
        said.clear()
        with pytest.raises(MinitronError):  # nobody answers there
            submit(load_recipe("recipe.yaml"), address=address, say=said.append, env="as-is", **options)
        return [line for line in said if "on this machine" in line]

    there = {"storage_path": str(tmp_path), "tracking_uri": "https://mlflow.invalid"}
    (line,) = submitted("https://head.invalid:8265", **there)
    assert all(f"{key}: /" in line for key in ("teacher.model", "data.path", "evaluate.tasks.0.data"))
    assert "--upload" in line
    assert submitted(NO_HEAD, storage_path=str(tmp_path)) == []
