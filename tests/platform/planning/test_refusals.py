"""Invalid input on the command line is refused before any work, by its name and with a remedy."""

from __future__ import annotations

import shutil

import pytest
from helpers.command import minitron_here

from minitron.errors import InputError
from minitron_platform.recipes.load import load_recipe

BAD = {
    "unknown key": (["--set", "distill.stepz=3"], "distill.stepz: unknown key", "steps"),
    "wrong type": (["--set", "distill.steps=many"], "distill.steps: 'many'", "--set distill.steps"),
    "neither a number nor auto": (
        ["--set", "resources.workers=many"],
        "resources.workers: 'many' is not valid: it should be a whole number, or 'auto'",
        "--set resources.workers",
    ),
    "target above the teacher": (
        ["--set", "family.0.parameters=900000"],
        "family.0.parameters: 900,000",
        "smaller target",
    ),
    "target nothing meets": (["--set", "family.0.parameters=1000"], "family.0.space: no combination", "widen"),
    "heads that do not divide": (
        ["--set", "family.0.space.num_heads=[5]"],
        "family.0.space.num_heads: 5",
        "multiples of 2",
    ),
    "hidden above the teacher": (
        ["--set", "family.0.space.hidden_size=[96]"],
        "hidden_size: 96 is larger",
        "at most 48",
    ),
    "halving after the last rung": (
        ["--set", "search.halving.grace=0.9"],
        "search.rungs: none of [0.5, 0.75]",
        "grace",
    ),
    "more workers than rows": (
        ["--set", "resources.workers_per_trial=5"],
        "resources.workers_per_trial: 5",
        "at most 4",
    ),
    "limits nothing keeps to": (
        ["--set", "family.0.limits.kv_cache_bytes=10"],
        "family.0.limits: none of",
        "raise family.0.limits",
    ),
    "a point of another size": (
        ["--set", "family.0.points=[{num_layers: 1}]"],
        "family.0.points.0: 1L",
        "change the point",
    ),
    "missing text": (["--set", "data.path=/nowhere/text.jsonl"], "/nowhere/text.jsonl", ""),
    "missing teacher": (["--set", "teacher.model=./nowhere"], "./nowhere", "model folder"),
    "unreadable teacher": (["--set", "teacher.model=broken"], "broken: config.json cannot be read", "config.json"),
    "a revision of a folder": (["--set", "teacher.revision=main"], "teacher.revision: main has no effect", "leave"),
    "missing package": (["--set", "teacher.model=package:nowhere_at_all/x.gguf"], "nowhere_at_all", "install"),
    "unknown task": (["--set", "evaluate.tasks.0.name=arc_eazy"], "arc_eazy", "arc_easy"),
    "warm-up too long": (["--set", "distill.warmup_steps=24"], "distill.warmup_steps: 24", "fewer"),
    "FP8 in a run that computes in float32": (
        ["--set", "distill.fp8=rowwise"],
        "distill.fp8: models that compute in float32",
        "bfloat16",
    ),
    "an empty prompt": (["--set", "evaluate.prompts=[a, '']"], "evaluate.prompts.1: ''", "--set evaluate.prompts"),
    "a prompt that is too long": (
        ["--set", f"evaluate.prompts=[a, '{'a ' * 2000}']"],
        "evaluate.prompts.1: the prompt has",
        "shorter prompt",
    ),
    "no such stage": (["--until", "prune"], "'prune' is not one of", "calibrate"),
    "too little room": (["--set", "data.train_rows=990000000000"], "GB free", "--storage"),
    "too little memory": (
        ["--set", "distill.batch_rows=1000000", "--set", "distill.micro_batch_rows=1000000"],
        "distill of tiny-student: needs about",
        "set distill.micro_batch_rows=1, which takes",
    ),
    "storage that is a file": (
        ["--storage", "text.jsonl"],
        "text.jsonl: cannot",
        "choose another folder with --storage",
    ),
    "storage that cannot be created": (
        ["--storage", "/proc/x"],
        "/proc/x: cannot",
        "choose another folder with --storage",
    ),
    "no address of a cluster": (["--address", "clustr"], "'clustr'", "give HOST:6379"),
    "a name with a slash": (["--set", "name=a/b"], "name: 'a/b'", "--set name="),
    "a reserved alias": (["--set", "register.alias=latest"], "not valid: MLflow reserves", "--set register.alias"),
    "a word for a section": (["--set", "register=x"], "'x' is not valid: it should be a section", "--set register"),
    "rows longer than the teacher takes": (["--set", "data.seq_length=5000"], "data.seq_length: 5000", "at most 2048"),
    "more calibration rows than rows": (["--set", "calibrate.rows=97"], "calibrate.rows: 97", "at most 96"),
    "no permission": (["--storage", "text.jsonl/runs"], "text.jsonl/runs", "--storage"),
    "GPUs that are not there": (["--set", "resources.gpus_per_trial=64"], "64 GPUs", "gpus_per_trial"),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_input_is_refused_before_work_starts(bench, case, tmp_path):
    (bench / "broken").mkdir(exist_ok=True)
    (bench / "broken" / "config.json").write_text("{not json")
    arguments, named, remedy = BAD[case]
    storage = [] if "--storage" in arguments else ["--storage", tmp_path / "runs"]
    refused = minitron_here("run", "recipe.yaml", *storage, *arguments, cwd=bench)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert named in refused.stderr
    assert remedy in refused.stderr
    assert not (tmp_path / "runs" / "stages").exists()


def test_a_plan_leaves_nothing_behind(bench, tmp_path):
    """Neither the storage nor the folder of MLflow's database, whose address may be mistyped."""
    places = ("--storage", tmp_path / "runs", "--tracking-uri", f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    planned = minitron_here("plan", "recipe.yaml", *places, cwd=bench)
    assert planned.returncode == 0, planned.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_with_damaged_weights_is_refused_by_name(bench, tmp_path):
    shutil.copytree(bench / "teacher", tmp_path / "teacher")
    weights = tmp_path / "teacher" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused = minitron_here(
        "run", "recipe.yaml", "--storage", tmp_path / "runs", "--set", f"teacher.model={tmp_path}/teacher", cwd=bench
    )
    assert refused.returncode == 2, refused.stderr
    assert f"{tmp_path}/teacher" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not list((tmp_path / "runs" / "stages").rglob("*.json"))


def test_a_missing_recipe_is_refused_with_the_names_of_the_existing_ones(tmp_path):
    refused = minitron_here("run", "smolm2-135m-cpu", cwd=tmp_path)
    assert refused.returncode == 2
    assert "did you mean 'smollm2-135m-cpu'" in refused.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("data.add_bos=1", "data.add_bos"),
        ("family.0.space.hidden_size={from: 1}", "family.0.space.hidden_size"),
        ("family.0.space.hidden_size=[a]", "family.0.space.hidden_size.0"),
        ("losses.hidden=7", "losses.hidden"),
        ("register.alias=3", "register.alias"),
    ],
)
def test_an_invalid_value_is_named_by_its_recipe_key(bench, override, key):
    with pytest.raises(InputError) as refused:
        load_recipe(str(bench / "recipe.yaml"), [override])
    assert f"recipe.yaml: {key}: " in refused.value.problem
    assert f"--set {key}=" in refused.value.remedy


@pytest.mark.parametrize(
    ("arguments", "problem", "remedy"),
    [
        (("ui", "--storage", "empty"), "empty/mlflow.db: there is no MLflow database", "check the storage"),
        (("importance", "show", "text.jsonl"), "text.jsonl: cannot be read as importance scores", "give a file that"),
        (("submit", "recipe.yaml", "--address", "127.0.0.1:8265"), "'127.0.0.1:8265'", "http://HOST:8265"),
    ],
)
def test_an_argument_of_another_command_is_refused_with_the_remedy_for_it(bench, arguments, problem, remedy):
    refused = minitron_here(*arguments, cwd=bench)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert problem in refused.stderr
    assert remedy in refused.stderr
