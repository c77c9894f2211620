"""A family of two models with a corrected teacher: each is pruned from the one before, and the losses depend on the depth."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers.command import minitron_here, run_minitron
from helpers.documents import one_by_one
from mlflow import MlflowClient
from safetensors.torch import load_file
from torch.nn import functional

from minitron import Architecture, ImportanceScores, prune
from minitron.data import Rows
from minitron.models import load_model
from minitron_platform.stages.correct import CorrectOutput
from minitron_platform.stages.stage_records import read_record

LARGE = {"num_layers": [3, 4], "hidden_size": [36, 48], "intermediate_size": [48, 72]}
SMALL = {"num_layers": [2, 3], "hidden_size": [36, 48], "intermediate_size": [48, 72]}


def _recipe(bench, name, **changes):
    values = yaml.safe_load((bench / "recipe.yaml").read_text())
    values |= {"name": name, "evaluate": {"tasks": []}, "resources": {"workers": 1, "cpus_per_trial": 2}, **changes}
    values["search"]["training"]["steps"] = 3
    values["data"]["separate_documents"] = True
    (bench / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return f"{name}.yaml"


def _correction(**changes):
    training = {"steps": 12, "batch_rows": 8, "peak_lr": 5e-3, "min_lr": 5e-4, "warmup_steps": 3, "checkpoint_every": 4}
    return {"method": "norms", "min_gain": 0.001, "probe_steps": 6, "training": training, **changes}


@pytest.fixture(scope="module")
def family(bench, ray_here, empty_database):
    """The command and the results of a run: a corrected teacher, a model pruned from it, and one pruned from that model."""
    members = [
        {"model": "tiny-large", "parameters": 75_000, "tolerance": 0.15, "space": LARGE},
        {"model": "tiny-small", "start": "previous", "parameters": 50_000, "tolerance": 0.15, "space": SMALL},
    ]
    recipe = _recipe(
        bench,
        "family",
        family=members,
        correct=_correction(),
        calibrate={"rows": 16, "layers": "logit_error", "depth": "scattered", "layer_rows": 4},
    )
    (bench / "family").mkdir()
    shutil.copy(empty_database, bench / "family")
    result = minitron_here("run", recipe, "--storage", "family", cwd=bench)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = (bench / "family" / "runs").glob("*/results.json")
    return result, json.loads(path.read_text())


def test_the_correction_of_a_teacher_is_kept_if_the_loss_improves(family):
    shared = family[1]["stages"]
    assert shared["correct"]["corrected"]
    assert shared["correct"]["loss_after"] < shared["correct"]["loss_before"] - 0.001
    before = load_file(Path(shared["teacher"]["folder"]) / "model.safetensors")
    after = load_file(Path(shared["correct"]["folder"]) / "model.safetensors")
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "norm" in name}


def test_the_documents_of_a_row_do_not_see_each_other_in_any_stage(bench, family):
    output, results = family
    shared, large = results["stages"], results["family"]["tiny-large"]
    rows = Rows.open(shared["data"]["folder"], "heldout")
    ids, end = rows.take(range(len(rows))), rows.boundaries.end
    assert bool((rows.boundaries.numbers(ids) > 1).any())

    def loss(checkpoint):
        model = load_model(checkpoint)
        logits = model.lm_head(one_by_one(model, ids, end))[:, :-1].flatten(0, 1)
        return functional.cross_entropy(logits.double(), ids[:, 1:].flatten()).item()

    teacher = load_model(shared["correct"]["folder"])
    (stored,) = [load_file(file) for file in Path(shared["targets"]["heldout"]).glob("shard-*/*.safetensors")]
    assert torch.allclose(stored["hidden"], one_by_one(teacher, ids, end), atol=1e-4)
    assert shared["correct"]["loss_before"] == pytest.approx(loss(shared["teacher"]["folder"]), abs=1e-4)
    assert large["evaluate"]["table"]["distilled"]["loss"] == pytest.approx(loss(large["distill"]["student"]), abs=1e-4)
    scores = ImportanceScores.load(large["calibrate"]["scores"])
    assert scores.provenance["documents"] == "separate"
    assert "documents  those in one row do not attend to each other, by masks, which are slow on CPUs" in output.stdout
    client = MlflowClient(f"sqlite:///{bench}/family/mlflow.db")
    (run,) = client.search_runs(
        [client.get_experiment_by_name("tiny").experiment_id], "params.separate_documents = 'True'"
    )
    assert run.data.tags["minitron.kind"] == "run"


def test_the_second_model_is_pruned_from_the_first_and_distilled_from_the_same_teacher(family):
    output, results = family
    large, small = results["family"]["tiny-large"], results["family"]["tiny-small"]
    assert small["distill"]["parameters"] < large["distill"]["parameters"]
    base = load_model(large["distill"]["student"])
    scores = ImportanceScores.load(small["calibrate"]["scores"])
    winner = Architecture.from_dict(small["search"]["winner"])
    removed = small["calibrate"]["removed"].get(str(winner.num_layers), [])
    kept = [i for i in range(large["search"]["winner"]["num_layers"]) if i not in removed]
    expected = prune(base, winner, scores, layers=kept).state_dict()
    actual = load_model(small["distill"]["pruned"]).state_dict()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    for own in (large, small):
        assert own["evaluate"]["table"]["teacher"]["kl"] == pytest.approx(0, abs=1e-6)
        assert own["evaluate"]["table"]["distilled"]["kl"] < own["evaluate"]["table"]["pruned"]["kl"]
    assert "tiny-small, cut from tiny-large" in output.stdout


def test_the_default_losses_depend_on_the_removed_depth(family):
    output, results = family
    for own in results["family"].values():
        deep = (
            own["search"]["winner"]["num_layers"] * 3 < results["stages"]["teacher"]["architecture"]["num_layers"] * 2
        )
        assert bool(own["distill"]["losses"]["hidden"]) == own["distill"]["losses"]["embedding"] == deep
        assert own["distill"]["losses_chosen"] in output.stdout
    depths = {own["search"]["winner"]["num_layers"] for own in results["family"].values()}
    assert min(depths) < 4  # of 5 layers, so that hidden states were compared at least once


def test_both_models_are_registered_with_their_lineage(bench, family):
    client = MlflowClient(f"sqlite:///{bench}/family/mlflow.db")
    large = client.get_model_version_by_alias("tiny-large", "candidate")
    small = client.get_model_version_by_alias("tiny-small", "candidate")
    assert large.tags["minitron.cut_from"] == "teacher"
    assert small.tags["minitron.cut_from"] == f"tiny-large version {large.version}"
    assert large.tags["minitron.teacher_corrected"] == "True"
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id], max_results=100)
    names = [run.info.run_name for run in runs]
    for name in ("correct", "search tiny-large", "distill tiny-small"):
        assert names.count(name) == 1
    assert {run.info.status for run in runs} == {"FINISHED"}
    page = next((bench / "family" / "runs").glob("*/report.html")).read_text()
    assert "cut from tiny-large" in page


def test_a_correction_that_gains_too_little_is_dropped_and_the_scores_are_reused(bench, family):
    recipe = yaml.safe_load((bench / "family.yaml").read_text())
    recipe["correct"]["min_gain"] = 5.0
    (bench / "kept.yaml").write_text(yaml.safe_dump(recipe))
    result = minitron_here("run", "kept.yaml", "--storage", "family", "--until", "calibrate", cwd=bench)
    assert result.returncode == 0, result.stdout + result.stderr
    line = next(x for x in result.stdout.splitlines() if x.startswith("✓ correct"))
    assert "after 6 steps, less than 5" in line
    left = [path for path in (bench / "family" / "stages" / "correct").glob("*") if not (path / "corrected").exists()]
    assert all(not (path / name).exists() for path in left for name in ("checkpoints", "probe"))
    # the importance scores of the original teacher are also used for the corrected one
    line = next(x for x in result.stdout.splitlines() if x.startswith("✓ calibrate"))
    assert "already done" in line
    folders = [path.parent for path in (bench / "family" / "stages" / "correct").glob("*/stage.json")]
    records = [read_record(str(bench / "family"), str(folder), CorrectOutput) for folder in folders]
    (kept,) = [record.output for record in records if not record.output.corrected]
    assert kept.folder == family[1]["stages"]["teacher"]["folder"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"family.0.start": "previous"}, "is the first model, so it cannot start from the previous one"),
        ({"family.1.parameters": "900000"}, "family.1.parameters: 900,000"),
        ({"family.1.space.num_layers": "[7]"}, "family.1.space"),
        ({"family.1.model": "tiny-large"}, "two models are called 'tiny-large'"),
        ({"calibrate.layers": "task"}, "calibrate.task"),
        ({"losses.top_k": "5", "losses.logits": "mse"}, "losses.top_k: 5"),
        ({"losses.top_k": "5000"}, "losses.top_k: 5000"),
        ({"losses.hidden": "[last-1:last-1, 4:9]"}, "losses: layer map '4:9'"),
        ({"losses.hidden": "foo"}, "losses.hidden: 'foo'"),
        ({"correct.probe_steps": "3"}, "correct.probe_steps: 3 is inside"),
        ({"correct.training.warmup_steps": "12"}, "correct.training.warmup_steps"),
    ],
)
def test_an_impossible_family_is_refused_before_work_starts(bench, family, change, named, tmp_path):
    settings = [word for key, value in change.items() for word in ("--set", f"{key}={value}")]
    refused = minitron_here("plan", "family.yaml", "--storage", tmp_path / "runs", *settings, cwd=bench)
    assert refused.returncode == 2, refused.stdout
    assert named in refused.stderr


def test_a_family_that_mlflow_did_not_take_is_registered_later_parents_first(bench, family, tmp_path, monkeypatch):
    monkeypatch.setattr("minitron_platform.pipeline.ANSWER_SECONDS", 0.3)
    monkeypatch.setattr("minitron_platform.tracking.flusher.LAST_PAUSE", 0.1)
    database = tmp_path / "mlflow.db"
    database.write_text("not a database")
    where = ["--storage", "family", "--tracking-uri", f"sqlite:///{database}"]
    done = minitron_here("run", "family.yaml", *where, "--set", "tracking=best-effort", cwd=bench)
    assert done.returncode == 0, done.stderr
    assert "tiny-large, tiny-small: not in the registry" in done.stdout
    assert "tiny-large, not registered yet, which tiny-small was cut from" in done.stdout
    database.unlink()
    sync = run_minitron("sync", *where, cwd=bench)
    assert sync.returncode == 0, sync.stderr
    # SQLAlchemy in this process still has the first file open
    client = MlflowClient(f"sqlite:///{shutil.copy(database, tmp_path / 'copy.db')}")
    parents = {
        name: client.get_model_version(name, "1").tags["minitron.cut_from"] for name in ("tiny-large", "tiny-small")
    }
    assert parents == {"tiny-large": "teacher", "tiny-small": "tiny-large version 1"}
