"""A whole recipe from the command line on a small real model: its results, its records and its registered student."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers.command import minitron_here
from helpers.finished_run import STAGES, results
from helpers.tiny import DISTILL_STEPS, SEARCH_STEPS
from huggingface_hub import ModelCard
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM

from minitron import Architecture
from minitron.evaluation import Score
from minitron_platform.tracking.links import newest_run_links


def test_a_run_prints_its_results_and_its_student_is_better_after_distillation(finished):
    done = results(finished.folder)
    table = done["evaluate"]["table"]
    assert table["teacher"]["kl"] == pytest.approx(0, abs=1e-6)
    assert table["distilled"]["kl"] < 0.8 * table["pruned"]["kl"]
    assert table["distilled"]["loss"] < table["pruned"]["loss"]
    assert table["pruned"]["parameters"] == table["distilled"]["parameters"] < table["teacher"]["parameters"]
    for model in ("teacher", "pruned", "distilled"):
        score = table[model]["tasks"]["arc_easy"]
        assert score["num_documents"] == 10
        assert score["stderr"] is not None
        assert f"{table[model]['kl']:.3f}" in finished.stdout
        assert f"{table[model]['parameters']:,}" in finished.stdout
    assert "first 10 of 12 documents" in " ".join(finished.stdout.split())  # the caption may be wrapped
    assert finished.stdout.count("  first step after ") == 2  # once for the search, once for the distillation
    assert re.search(r"^resources  .*: \d+ workers? with ", finished.stdout, re.MULTILINE)
    assert " ui --storage runs" in finished.stdout
    assert " promote tiny-student --version 1 --storage runs" in finished.stdout


def test_every_candidate_was_distilled_on_the_same_tokens(finished):
    done = results(finished.folder)
    # the teacher ran once on each row, for all candidates together
    assert done["targets"]["rows_computed"] == done["targets"]["rows_stored"] == 96 + 16
    assert "teacher ran on 112 of 112 rows" in finished.stdout
    ranking = done["search"]["ranking"]
    assert len(ranking) == done["search"]["candidates"] >= 6
    assert [r["kl"] for r in ranking] == sorted(r["kl"] for r in ranking)
    assert {r["tokens"] for r in ranking} == {SEARCH_STEPS * 4 * 32}
    assert all(r["kl"] < r["kl_undistilled"] for r in ranking)
    assert all(56_000 <= r["parameters"] <= 104_000 for r in ranking)
    assert len({r["architecture"]["num_layers"] for r in ranking}) > 1
    assert len({r["architecture"]["hidden_size"] for r in ranking}) > 1
    winner = done["search"]["winner"]
    (chosen,) = [r for r in ranking if r["winner"]]
    assert chosen["flops_per_token"] == min(r["flops_per_token"] for r in ranking if r["tied"])
    assert winner == chosen["architecture"]
    assert done["distill"]["architecture"] == winner
    assert done["search"]["reason"] in finished.stdout
    page = next((finished.folder / "runs" / "runs").glob("*/report.html")).read_text()
    assert done["search"]["reason"] in html.unescape(page)


def test_the_student_loads_without_minitron_and_gives_the_same_logits(finished, tmp_path):
    folder = results(finished.folder)["distill"]["student"]
    program = (
        "import sys, torch\n"
        "for name in ('minitron', 'minitron_search', 'minitron_platform'): sys.modules[name] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({folder!r}).eval()\n"
        f"ids = AutoTokenizer.from_pretrained({folder!r})('the teacher reads a page', return_tensors='pt').input_ids\n"
        "torch.save((ids, model(ids).logits.detach()), 'logits.pt')\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True)
    ids, logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
    assert torch.equal(ours, logits)
    assert logits.std() > 0.1


def test_mlflow_shows_the_run_its_stages_and_the_trials_below_the_search(finished):
    client = MlflowClient(f"sqlite:///{finished.folder}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("tiny")
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    assert {run.info.status for run in runs} == {"FINISHED"}
    by_id = {run.info.run_id: run for run in runs}
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    (parent,) = parents
    stages = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(run.info.run_name for run in stages) == sorted(STAGES)
    trials = [run for run in runs if run.data.tags.get("minitron.kind") == "trial"]
    assert len(trials) == results(finished.folder)["search"]["candidates"]
    assert {by_id[run.data.tags["mlflow.parentRunId"]].info.run_name for run in trials} == {"search"}
    for run in trials:
        assert len(run.data.metrics) <= 30
        tokens = {p.step: p.value for p in client.get_metric_history(run.info.run_id, "tokens")}
        for curve in ("train_kl", "heldout_kl"):
            steps = {point.step for point in client.get_metric_history(run.info.run_id, curve)}
            assert all(tokens[step] == step * 4 * 32 for step in steps)
        assert tokens[SEARCH_STEPS] == SEARCH_STEPS * 4 * 32
    best = min(trials, key=lambda run: run.data.metrics["heldout_kl"])
    assert best.data.metrics["heldout_kl"] == pytest.approx(results(finished.folder)["search"]["ranking"][0]["kl"])
    distill = next(run for run in stages if run.info.run_name == "distill")
    history = client.get_metric_history(distill.info.run_id, "train_kl")
    assert [point.step for point in history] == list(range(1, DISTILL_STEPS + 1))
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {
        "recipe.yaml",
        "report.html",
        "results.json",
    }
    assert parent.data.params.items() >= {"distill.steps": str(DISTILL_STEPS), "seq_length": "32"}.items()
    done = results(finished.folder)
    assert parent.data.params["architecture.tiny-student"] == str(Architecture.from_dict(done["search"]["winner"]))
    assert parent.data.metrics["distilled.kl"] == pytest.approx(done["evaluate"]["table"]["distilled"]["kl"])
    load = {name for name in parent.data.metrics if name.startswith("system/")}
    assert len(parent.data.metrics.keys() - load) <= 12
    assert parent.data.metrics["system/system_memory_usage_megabytes"] > 0
    samples = client.get_metric_history(parent.info.run_id, "system/cpu_utilization_percentage")
    assert all(late.step - early.step > 5 for early, late in pairwise(sorted(samples, key=lambda each: each.step)))
    evaluated = next(run for run in stages if run.info.run_name == "evaluate").data.metrics
    for name in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"):  # all metrics of a task
        assert 0 < evaluated[f"distilled.arc_easy.{name}"] <= 1
    assert evaluated["distilled.arc_easy.documents"] == 10
    tags = next(run for run in stages if run.info.run_name == "evaluate").data.tags
    assert tags["minitron.benchmark.arc_easy"].startswith("acc, 0-shot, first 10 of ")
    assert "| tiny-student |" in parent.data.tags["mlflow.note.content"]
    assert parent.data.tags["mlflow.user"]
    given = {i.tags[0].value: i.dataset for i in client.get_run(parent.info.run_id).inputs.dataset_inputs}
    assert given["training"].digest == done["data"]["train"]
    assert json.loads(given["training"].profile) == {"tokens": done["data"]["train_tokens"]}
    assert given["heldout"].digest == done["data"]["heldout"]
    page, report = newest_run_links(f"sqlite:///{finished.folder}/runs/mlflow.db", "http://host:1/")
    assert page == f"http://host:1/#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"
    assert f"/runs/{parent.info.run_id}/artifacts/report.html?" in report


def test_the_student_is_registered_with_its_lineage_and_can_be_promoted(finished, copied):
    done = results(finished.folder)
    client = MlflowClient(f"sqlite:///{finished.folder}/runs/mlflow.db")
    version = client.get_model_version_by_alias("tiny-student", "candidate")
    assert version.source == done["distill"]["student"]
    assert json.loads(version.tags["minitron.teacher_sha256"]) == done["teacher"]["sha256"]
    assert json.loads(version.tags["minitron.architecture"]) == done["search"]["winner"]
    assert int(version.tags["minitron.tokens"]) == DISTILL_STEPS * 4 * 32
    assert float(version.tags["minitron.heldout_kl"]) == pytest.approx(
        done["evaluate"]["table"]["distilled"]["kl"], abs=1e-6
    )
    card = ModelCard.load(Path(version.source) / "README.md")
    assert card.text.strip() == version.description
    assert f"{done['distill']['parameters']:,} parameters" in card.text
    (result,) = card.data.eval_results
    score = done["evaluate"]["table"]["distilled"]["tasks"]["arc_easy"]
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("arc_easy", "acc", score["value"])
    settings = Score(**score).settings
    assert settings.startswith("0-shot, first 10 of ")
    assert result.metric_name == f"acc {Score(**score).text} % ({settings})"
    assert f"| arc\\_easy acc, % ({settings}) | " in card.text
    assert card.text.count(f" {Score(**score).text} |") >= 1
    assert "; ± is the standard error" in card.text
    (model,) = client.search_logged_models([client.get_experiment_by_name("tiny").experiment_id])
    assert str(model.status) == "READY"
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "tiny-student", "version": str(version.version)}]
    assert model.source_run_id == version.run_id
    shown = {metric.key: metric.value for metric in model.metrics}
    assert shown["kl"] == pytest.approx(done["evaluate"]["table"]["distilled"]["kl"])
    assert shown["arc_easy.acc"] == score["value"]
    assert shown["teacher.parameters"] == done["evaluate"]["table"]["teacher"]["parameters"]
    assert model.params["arc_easy.measured_on"] == settings
    assert model.params["architecture"] == str(Architecture.from_dict(done["search"]["winner"]))
    listed = minitron_here("models", "--storage", "runs", cwd=finished.folder)
    assert "tiny-student" in listed.stdout
    assert "candidate" in listed.stdout
    promoted = minitron_here("promote", "tiny-student", "--storage", "runs", cwd=copied)
    assert promoted.returncode == 0, promoted.stderr
    client = MlflowClient(f"sqlite:///{copied}/runs/mlflow.db")
    assert client.get_model_version_by_alias("tiny-student", "champion").version == version.version


def test_the_recipe_the_records_and_the_database_of_a_run_are_their_owners_alone(finished):
    files = [
        finished.folder / "runs" / "mlflow.db",
        *finished.folder.glob("runs/runs/*/recipe.yaml"),
        *finished.folder.glob("runs/runs/*/spool/*.jsonl"),
    ]
    assert len(files) >= 3
    assert {file.stat().st_mode & 0o077 for file in files} == {0}
