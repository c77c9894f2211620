"""A whole recipe from the command line on a small real model: its results, its resumption and its errors."""

from __future__ import annotations

import html
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers.command import command, environment, minitron_here, run_minitron
from helpers.report_page import ELEMENTS, ReportPage, drawn
from helpers.tiny import DISTILL_STEPS, SEARCH_STEPS
from huggingface_hub import ModelCard
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM

from minitron import Architecture
from minitron_platform import load_recipe
from minitron_platform.console import Console
from minitron_platform.leases import lease
from minitron_platform.locations import resolve_locations
from minitron_platform.report.candidates import findings
from minitron_platform.report.finished_run import finished_run
from minitron_platform.report.page import page
from minitron_platform.stages.finished import run_key
from minitron_platform.stages.search_output import SearchOutput
from minitron_platform.tracking.links import newest_run_links

STAGES = ["teacher", "data", "correct", "calibrate", "targets", "search", "distill", "evaluate", "register"]


def _minitron_in_terminal(*arguments, cwd):
    """`run_minitron` with its output in a terminal; returns the exit code and the output."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command(*arguments), cwd=cwd, env={**environment(), "TERM": "xterm"}, stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    shown = b""
    with suppress(OSError):  # reading ends in an error when the process closes the terminal
        while piece := os.read(master, 65536):
            shown += piece
    os.close(master)
    return process.wait(), shown.decode(errors="replace")


@pytest.fixture(scope="module")
def finished(bench):
    """The result of the command `minitron run`, which all tests share."""
    result = run_minitron("run", "recipe.yaml", "--storage", "runs", cwd=bench)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def _reused(result):
    """Number of stages that a run found already done."""
    return sum(line.startswith("✓") and "already done" in line for line in result.stdout.splitlines())


def _results(bench, storage="runs", model="tiny-student"):
    """Outputs of the stages, the shared ones and those of one model of the family, by name."""
    (path,) = (bench / storage / "runs").glob("*/results.json")
    results = json.loads(path.read_text())
    return results["stages"] | results["family"][model]


def test_a_run_prints_its_results_and_its_student_is_better_after_distillation(bench, finished):
    done = _results(bench)
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


def test_every_candidate_was_distilled_on_the_same_tokens(bench, finished):
    done = _results(bench)
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
    page = next((bench / "runs" / "runs").glob("*/report.html")).read_text()
    assert done["search"]["reason"] in html.unescape(page)


def test_the_report_is_one_file_without_requests_and_its_charts_have_data(bench, finished):
    page = ReportPage(next((bench / "runs" / "runs").glob("*/report.html")).read_text())
    assert page.elements <= ELEMENTS
    assert [address for address in page.addresses if not address.startswith("#")] == []
    assert "default-src 'none'" in page.policy
    assert len(page.code) == 1 == len(page.allowed_code())
    done = _results(bench)
    first = {name: next(iter(chart["views"])) for name, chart in page.charts.items()}
    quality, benchmarks, candidates, curves, layers, _, stages = page.charts
    assert len(page.charts[quality]["views"]) == 4 * 3  # loss, KL, agreement and a benchmark against three costs
    assert drawn(page.charts[quality], first[quality]) >= 3
    assert drawn(page.charts[benchmarks], first[benchmarks]) == 2 * 3  # a point and its error for each model
    assert set(page.charts[candidates]["views"]) == {"size", "compute", "memory", "training"}
    assert drawn(page.charts[candidates], "memory") >= len(done["search"]["ranking"])
    assert drawn(page.charts[layers], first[layers]) == 2 * done["teacher"]["architecture"]["num_layers"]
    assert drawn(page.charts[curves], first[curves]) >= DISTILL_STEPS
    assert drawn(page.charts[stages], first[stages]) == len(STAGES)


def test_texts_of_others_are_text_in_the_report(bench, finished):
    evil = '</script><img src=x onerror="alert(1)">\x1b]0;owned\x07'
    state = finished_run(resolve_locations(str(bench / "runs")), next((bench / "runs" / "runs").glob("*-*")).name)
    (member,) = state.recipe.family
    changes = {"description": evil, "family": [member.model_copy(update={"model": evil})]}
    state.recipe = state.recipe.model_copy(update=changes)
    state.family = {evil: state.family[member.model]}
    text = page([state])
    shown = ReportPage(text)
    assert shown.elements <= ELEMENTS
    assert len(shown.code) == 1 == len(shown.allowed_code())
    assert html.escape("<img src=x") in text
    assert any(row.get("name", "").startswith("</script><img") for row in shown.charts["chart-1"]["rows"])
    assert "\x1b" not in text + str(shown.charts)


def test_runs_are_compared_on_one_page_and_one_is_written_again(bench, finished, tmp_path):
    for name in ("stages", "trials", "runs"):
        shutil.copytree(bench / "runs" / name, tmp_path / "runs" / name)
    (one,) = (tmp_path / "runs" / "runs").iterdir()
    other = one.with_name("other-1f")
    shutil.copytree(one, other)
    (other / "results.json").write_text((one / "results.json").read_text().replace(one.name, other.name))
    (one / "report.html").unlink()
    listed = minitron_here("report", "--storage", "runs", cwd=tmp_path)
    assert {line.split()[0] for line in listed.stdout.splitlines()} == {one.name, other.name}
    again = minitron_here("report", one.name, "--storage", "runs", cwd=tmp_path)
    assert str(one / "report.html") in again.stdout.replace("\n", "")
    assert len(ReportPage((one / "report.html").read_text()).charts) == 7
    both = minitron_here("report", one.name, "other", "--storage", "runs", "--out", "both.html", cwd=tmp_path)
    assert both.returncode == 0, both.stderr
    text = (tmp_path / "both.html").read_text()
    page = ReportPage(text)
    assert page.elements <= ELEMENTS
    assert len(page.charts) == 2 + 2 * 5
    assert {row["name"] for row in page.charts["chart-1"]["rows"]} == {
        f"{run} {model}" for run in (one.name, other.name) for model in ("teacher", "tiny-student")
    }
    unknown = minitron_here("report", "absent", "--storage", "runs", cwd=tmp_path)
    assert unknown.returncode == 2
    assert other.name in unknown.stderr


def test_the_student_loads_without_minitron_and_gives_the_same_logits(bench, finished):
    folder = _results(bench)["distill"]["student"]
    program = (
        "import sys, torch\n"
        "for name in ('minitron', 'minitron_search', 'minitron_platform'): sys.modules[name] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({folder!r}).eval()\n"
        f"ids = AutoTokenizer.from_pretrained({folder!r})('the teacher reads a page', return_tensors='pt').input_ids\n"
        "torch.save((ids, model(ids).logits.detach()), 'logits.pt')\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=bench, check=True, capture_output=True)
    ids, logits = torch.load(bench / "logits.pt", weights_only=True)
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
    assert torch.equal(ours, logits)
    assert logits.std() > 0.1


def test_mlflow_shows_the_run_its_stages_and_the_trials_below_the_search(bench, finished):
    client = MlflowClient(f"sqlite:///{bench}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("tiny")
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    assert {run.info.status for run in runs} == {"FINISHED"}
    by_id = {run.info.run_id: run for run in runs}
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    (parent,) = parents
    stages = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(run.info.run_name for run in stages) == sorted(STAGES)
    trials = [run for run in runs if run.data.tags.get("minitron.kind") == "trial"]
    assert len(trials) == _results(bench)["search"]["candidates"]
    assert {by_id[run.data.tags["mlflow.parentRunId"]].info.run_name for run in trials} == {"search"}
    for run in trials:
        assert len(run.data.metrics) <= 30
        tokens = {p.step: p.value for p in client.get_metric_history(run.info.run_id, "tokens")}
        for curve in ("train_kl", "heldout_kl"):
            steps = {point.step for point in client.get_metric_history(run.info.run_id, curve)}
            assert all(tokens[step] == step * 4 * 32 for step in steps)
        assert tokens[SEARCH_STEPS] == SEARCH_STEPS * 4 * 32
    best = min(trials, key=lambda run: run.data.metrics["heldout_kl"])
    assert best.data.metrics["heldout_kl"] == pytest.approx(_results(bench)["search"]["ranking"][0]["kl"])
    distill = next(run for run in stages if run.info.run_name == "distill")
    history = client.get_metric_history(distill.info.run_id, "train_kl")
    assert [point.step for point in history] == list(range(1, DISTILL_STEPS + 1))
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {
        "recipe.yaml",
        "report.html",
        "results.json",
    }
    assert parent.data.params.items() >= {"distill.steps": str(DISTILL_STEPS), "seq_length": "32"}.items()
    done = _results(bench)
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
    assert "| tiny-student |" in parent.data.tags["mlflow.note.content"]
    assert parent.data.tags["mlflow.user"]
    given = {i.tags[0].value: i.dataset for i in client.get_run(parent.info.run_id).inputs.dataset_inputs}
    assert given["training"].digest == done["data"]["train"]
    assert json.loads(given["training"].profile) == {"tokens": done["data"]["train_tokens"]}
    assert given["heldout"].digest == done["data"]["heldout"]
    page, report = newest_run_links(f"sqlite:///{bench}/runs/mlflow.db", "http://host:1/")
    assert page == f"http://host:1/#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"
    assert f"/runs/{parent.info.run_id}/artifacts/report.html?" in report


def test_the_student_is_registered_with_its_lineage_and_can_be_promoted(bench, finished):
    done = _results(bench)
    client = MlflowClient(f"sqlite:///{bench}/runs/mlflow.db")
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
    (model,) = client.search_logged_models([client.get_experiment_by_name("tiny").experiment_id])
    assert str(model.status) == "READY"
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "tiny-student", "version": version.version}]
    assert model.source_run_id == version.run_id
    shown = {metric.key: metric.value for metric in model.metrics}
    assert shown["kl"] == pytest.approx(done["evaluate"]["table"]["distilled"]["kl"])
    assert shown["arc_easy.acc"] == score["value"]
    assert shown["teacher.parameters"] == done["evaluate"]["table"]["teacher"]["parameters"]
    assert model.params["architecture"] == str(Architecture.from_dict(done["search"]["winner"]))
    listed = minitron_here("models", "--storage", "runs", cwd=bench)
    assert "tiny-student" in listed.stdout
    assert "candidate" in listed.stdout
    promoted = minitron_here("promote", "tiny-student", "--storage", "runs", cwd=bench)
    assert promoted.returncode == 0, promoted.stderr
    assert client.get_model_version_by_alias("tiny-student", "champion").version == version.version


def test_the_recipe_the_records_and_the_database_of_a_run_are_their_owners_alone(bench, finished):
    files = [
        bench / "runs" / "mlflow.db",
        *bench.glob("runs/runs/*/recipe.yaml"),
        *bench.glob("runs/runs/*/spool/*.jsonl"),
    ]
    assert len(files) >= 3
    assert {file.stat().st_mode & 0o077 for file in files} == {0}


def test_running_again_repeats_nothing(bench, finished):
    before = {p: p.stat().st_mtime_ns for p in (bench / "runs" / "stages").rglob("*") if p.is_file()}
    again = minitron_here("run", "recipe.yaml", "--storage", "runs", cwd=bench)
    assert again.returncode == 0, again.stderr
    assert _reused(again) == len(STAGES)
    assert before == {p: p.stat().st_mtime_ns for p in (bench / "runs" / "stages").rglob("*") if p.is_file()}
    client = MlflowClient(f"sqlite:///{bench}/runs/mlflow.db")
    assert len(client.search_model_versions("name='tiny-student'")) == 1


def test_a_changed_recipe_repeats_only_the_stages_that_depend_on_the_change(bench, finished):
    changed = minitron_here(
        "run", "recipe.yaml", "--storage", "runs", "--set", "evaluate.tasks.0.limit=5", "--until", "evaluate", cwd=bench
    )
    assert changed.returncode == 0, changed.stderr
    assert _reused(changed) == STAGES.index("evaluate")


def _diverging(section):
    """Settings with which each step makes every weight a thousand times as large."""
    return [f"--set={section}.{key}" for key in ("peak_lr=10", "min_lr=10", "weight_decay=100")]


def test_a_run_that_diverges_stops_and_names_the_step(bench, finished, ray_here):
    steep = _diverging("distill")
    stopped = minitron_here("run", "recipe.yaml", "--storage", "runs", *steep, cwd=bench)
    assert stopped.returncode == 2, stopped.stdout + stopped.stderr
    assert "at step" in stopped.stderr
    assert "learning rate" in stopped.stderr
    assert _reused(stopped) == STAGES.index("distill")
    few = "--set=family.0.space={num_layers: [4], hidden_size: [36], intermediate_size: [48, 72]}"
    steep = [few, *_diverging("search.training")]
    stopped = minitron_here("run", "recipe.yaml", "--storage", "runs", *steep, cwd=bench)
    assert stopped.returncode == 2, stopped.stdout + stopped.stderr
    said = stopped.stderr.splitlines()
    (first,) = [number for number, line in enumerate(said) if "no candidate of the search finished" in line]
    lines = said[first + 1 : first + 3]
    assert len(lines) == 2
    assert all(" hidden · " in line and "at step" in line and "learning rate" in line for line in lines)
    assert "Traceback" not in stopped.stderr + stopped.stdout
    client = MlflowClient(f"sqlite:///{bench}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("tiny").experiment_id
    failed = client.search_runs([experiment], "tags.`minitron.kind` = 'run' AND attributes.status = 'FAILED'")
    assert len(failed) == 2
    for run in failed:  # which recipe has failed is known
        assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["recipe.yaml"]


def test_a_wider_space_distils_only_the_new_candidates(bench, finished, ray_here):
    before = {p: p.stat().st_mtime_ns for p in (bench / "runs" / "trials").glob("*/*/result.json")}
    stored = {p: p.stat().st_mtime_ns for p in (bench / "runs" / "stages" / "targets").rglob("*") if p.is_file()}
    wider = ["--set", "family.0.tolerance=0.5", "--until", "search"]
    again = minitron_here("run", "recipe.yaml", "--storage", "runs", *wider, cwd=bench)
    assert again.returncode == 0
    assert _reused(again) == STAGES.index("search")  # the teacher does not run again
    assert stored == {p: p.stat().st_mtime_ns for p in (bench / "runs/stages/targets").rglob("*") if p.is_file()}
    after = {p: p.stat().st_mtime_ns for p in (bench / "runs" / "trials").glob("*/*/result.json")}
    assert len(after) > len(before)
    assert before.items() <= after.items()


def test_a_failed_candidate_is_reported_with_its_reason_and_the_run_continues(bench, finished, ray_here):
    shutil.copytree(bench / "runs", bench / "failing")
    shutil.rmtree(bench / "failing" / "stages" / "search")
    failing = next(r["architecture"] for r in reversed(_results(bench)["search"]["ranking"]) if not r["winner"])
    name = str(Architecture.from_dict(failing))
    for path in (bench / "failing").glob("trials/*/*/result.json"):
        if json.loads(path.read_text())["architecture"] == failing:
            path.unlink()
            damaged = path.with_name("undistilled.json")
            damaged.write_text("{}")  # its trial raises when it reads this file
    result = minitron_here("run", "recipe.yaml", "--storage", "failing", "--set", "resources.max_failures=1", cwd=bench)
    assert result.returncode == 0, result.stdout + result.stderr
    reason = f"{damaged}: not a trial's file (KeyError: 'kl'); delete the file and run again"
    retried = f"{reason}; resumed from step 0, 0 restarts left"
    assert re.search(rf"restart {re.escape(name)} on .*: {re.escape(retried)}", result.stdout)
    assert f"failed  {name}: {reason}" in result.stdout
    assert ", 1 failed" in result.stdout
    newest = max((bench / "failing" / "runs").glob("*/results.json"), key=lambda path: path.stat().st_mtime_ns)
    found = json.loads(newest.read_text())["family"]["tiny-student"]["search"]
    assert found["failures"] == [{"architecture": failing, "reason": reason}]
    assert found["winner"] == _results(bench)["search"]["winner"]
    page = html.unescape(newest.with_name("report.html").read_text())
    assert f'<th scope="row">{name}</th><td class="text">{reason}</td>' in page
    assert f'<td class="text">{reason}</td><td>0</td><td>0</td>' in page.partition("<h2>Restarts</h2>")[2]
    client = MlflowClient(f"sqlite:///{bench}/failing/mlflow.db")
    experiment = client.get_experiment_by_name("tiny").experiment_id
    runs = client.search_runs([experiment], max_results=100)
    (trial,) = [run for run in runs if run.data.tags.get("minitron.failure") == reason]
    assert trial.info.run_name == Architecture.from_dict(failing).label()
    assert trial.info.status == "FAILED"
    assert trial.data.metrics["restarts"] == 1
    assert retried in trial.data.tags["minitron.restart.1"]
    (trace,) = newest.parent.glob("trial-*.txt")  # the traceback is stored with the run and in MLflow
    assert "trial.py" in trace.read_text()
    assert trace.name in {file.path for file in client.list_artifacts(trial.info.run_id)}


def _descendants_running(pid, command):
    """Descendants of process `pid` whose command line begins with `command`."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    table = [line.split(None, 2) for line in listed.splitlines()]
    parents = {int(child): int(parent) for child, parent, *_ in table}

    def below(child):
        return child == pid or (child in parents and child != parents[child] and below(parents[child]))

    return [int(child) for child, _, *args in table if args and args[0].startswith(command) and below(int(child))]


@pytest.mark.long
def test_an_online_teacher_is_stored_for_the_search_alone_and_a_killed_worker_is_reported(bench):
    settings = ["targets.mode=online", "targets.teacher=sharded", "targets.top_k=40", "distill.evaluate_tasks_every=12"]
    # a trial has two workers, each with as many CPUs as there are cores: the private Ray offers what they request
    settings += [
        "distill.evaluate_every=8",
        "distill.shard=true",
        "resources.workers=2",
        "resources.workers_per_trial=2",
        f"resources.cpus_per_trial={os.cpu_count()}",
        # relative to the driver's working folder, which is not that of the workers
        "evaluate.tasks=[{name: arc_easy, data: arc.jsonl, limit: 10}, {name: hellaswag, data: arc.jsonl}]",
    ]
    one = "family.0.space={num_layers: [4], hidden_size: [36], intermediate_size: [48]}"
    process = _start(bench, "online", *settings, one, until="distill")
    saved = "stages/distill/*/checkpoints/step-*/manifest.json"
    _wait_until(process, lambda: sorted((bench / "online").glob(saved)), "a checkpoint")
    unused = ("DatasetManager", "PlacementGroupCleaner", "PreemptionWatcher", "_AutoscalingCoordinatorActor")
    assert not [name for name in unused if _descendants_running(process.pid, f"ray::{name}")]
    os.kill(_descendants_running(process.pid, "ray::RayTrainWorker")[0], signal.SIGKILL)
    assert process.wait(timeout=240) == 0, (bench / "online.log").read_text()
    shown = (bench / "online.log").read_text()
    assert "teacher ran on 40 of 40 rows (of the training rows, only those that the search reads)" in shown
    client = MlflowClient(f"sqlite:///{bench}/online/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    metrics = {run.info.run_name: run.data.metrics for run in runs}
    assert 0 < metrics["targets"]["mass_lost_mean"] < metrics["targets"]["mass_lost_worst"] < 1
    assert "the top 40 tokens leave out a probability of" in shown
    assert metrics["distill"]["teacher_shards"] == 2
    (distilled,) = [run for run in runs if run.info.run_name == "distill"]
    tasks = client.get_metric_history(distilled.info.run_id, "task_arc_easy.acc")
    assert {point.step for point in tasks} == {12, 24}
    for change in (
        "task_arc_easy.acc_change",
        "task_arc_easy.acc_band",
    ):  # since the first measurement, also if resumed
        assert {point.step for point in client.get_metric_history(distilled.info.run_id, change)} == {24}
    assert "their fields are" in distilled.data.tags["minitron.failed.hellaswag"]  # the training continued
    assert {p.step for p in client.get_metric_history(distilled.info.run_id, "heldout_kl")} == {8, 16, 24}
    # a sharded student is gathered at these steps alone
    evaluated = client.get_metric_history(distilled.info.run_id, "seconds_evaluation")
    assert {point.step for point in evaluated if point.value} == {8, 12, 16, 24}
    losses = client.get_metric_history(distilled.info.run_id, "train_kl")
    assert losses[-1].value < 0.8 * losses[0].value
    # the student that no worker ever had in one piece is a checkpoint like any other
    (saved_student,) = (bench / "online").glob("stages/distill/*/student/model.safetensors")
    student = AutoModelForCausalLM.from_pretrained(saved_student.parent)
    assert (len(student.model.layers), student.config.hidden_size, student.dtype) == (4, 36, torch.float32)
    # the killed worker is reported in the terminal, in MLflow and in the results
    (record,) = (bench / "online").glob("stages/distill/*/stage.json")
    (restart,) = json.loads(record.read_text())["outputs"]["restarts"]
    assert restart["step"] in range(4, DISTILL_STEPS, 4)
    assert restart["left"] == 2
    assert socket.gethostname() in restart["node"]
    assert restart["reason"].startswith("its process was killed or crashed")
    said = f"{restart['what']} on {restart['node']}: {restart['reason']}"
    assert f"failed  {said}; restarting, 2 restarts left\n" in shown
    assert f"resumed from step {restart['step']}\n" in shown
    assert distilled.data.metrics["restarts"] == 1
    assert f"{said}; resumed from step {restart['step']}, 2 restarts left" in distilled.data.tags["minitron.restart.1"]


def test_a_search_with_halving_reports_how_early_the_order_was_known(bench, finished, ray_here):
    before = {p: p.stat().st_mtime_ns for p in (bench / "runs" / "trials").glob("*/*/*.json")}
    early = ["--set", "search.forward.keep=4", "--set", "search.halving.keep=0.5", "--until", "search"]
    result = minitron_here("run", "recipe.yaml", "--storage", "runs", *early, cwd=bench)
    assert result.returncode == 0, result.stdout + result.stderr
    records = [json.loads(p.read_text())["outputs"] for p in (bench / "runs/stages/search").glob("*/stage.json")]
    (stopping,) = [record for record in records if record["stopped"]]
    (whole,) = [record for record in records if record["fingerprint"] == _results(bench)["search"]["fingerprint"]]
    assert len(stopping["stopped"]) == len(stopping["ranking"]) == 2
    assert "2 stopped early, 2 of" in result.stdout
    assert sum(row["distilled"] for row in stopping["forward"]) == 4
    # it shares the trials of the search without halving, whose report says what stopping would have saved
    assert before == {p: p.stat().st_mtime_ns for p in (bench / "runs" / "trials").glob("*/*/*.json")}
    assert [row["measure"] for row in whole["stability"]][3:] == ["KL at step 3", "KL at step 5"]
    page = html.unescape(next((bench / "runs" / "runs").glob("*/report.html")).read_text())
    assert all(sentence in page for sentence in findings(SearchOutput.model_validate(whole)))
    assert all(f"{row['tau']:.2f}" in page for row in whole["stability"])
    (stops,) = [
        sentence
        for sentence in findings(SearchOutput.model_validate(stopping))
        if "stopped early at a rung" in sentence
    ]
    assert f"2 were stopped early at a rung, which saved {2 / 24:.0%}" in stops


def test_a_deleted_mlflow_database_is_filled_again(bench, finished):
    for file in (bench / "runs").glob("mlflow.db*"):
        file.unlink()
    again = run_minitron("run", "recipe.yaml", "--storage", "runs", cwd=bench)
    assert again.returncode == 0, again.stderr
    assert _reused(again) == len(STAGES) - 1
    version = MlflowClient(f"sqlite:///{bench}/runs/mlflow.db").get_model_version_by_alias("tiny-student", "candidate")
    assert version.source == _results(bench)["distill"]["student"]


def test_sigterm_stops_a_search_and_ctrl_c_a_start_and_both_say_how_to_resume(bench, finished):
    process = _start(bench, "interrupted", "search.training.steps=200")
    _wait_until(process, lambda: list((bench / "interrupted").glob("trials/*/*/result.json")), "finished trial")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=90) == 143
    said = (bench / "interrupted.log").read_text()
    _, last = said.split("stopped; to resume: ")
    assert " run recipe.yaml --storage interrupted --until register" in last.splitlines()[0]
    assert len(last.splitlines()) == 1
    assert "Traceback" not in said
    assert "SIGTERM" not in said  # Ray's stack begins with it
    assert not list((bench / "interrupted").glob("stages/search/*/stage.json"))
    client = MlflowClient(f"sqlite:///{bench}/interrupted/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    status = {run.info.run_name: run.info.status for run in runs}
    assert status.pop("search") == "KILLED"
    assert status.pop(next(name for name in status if name.startswith("tiny"))) == "KILLED"  # the whole run
    assert {status[name] for name in ("data", "calibrate", "targets")} == {"FINISHED"}
    assert "RUNNING" not in status.values(), status

    process = _start(bench, "interrupted")
    _wait_until(process, lambda: "Minitron" in (bench / "interrupted.log").read_text(), "output")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=90) == 130
    said = (bench / "interrupted.log").read_text()
    assert "stopped; to resume: " in said
    assert "Traceback" not in said


def _start(bench, storage, *settings, until="register"):
    log = open(bench / f"{storage}.log", "w")  # noqa: SIM115 (lives as long as the process)
    return subprocess.Popen(
        command(
            "run",
            "recipe.yaml",
            "--storage",
            storage,
            "--until",
            until,
            *(part for value in settings for part in ("--set", value)),
        ),
        cwd=bench,
        env=environment(),
        stdout=log,
        stderr=log,
        # a background process may ignore Ctrl-C, and its children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _kill_when(process, condition, what):
    """Kills the driver and with it all that it started: a worker left alone for a moment may finish what it does."""
    _wait_until(process, condition, what)
    for pid in (process.pid, *_descendants(process.pid)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _descendants(pid):
    shown = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = dict(map(int, line.split()) for line in shown.splitlines())
    below = [pid]
    for parent in below:  # which grows
        below += [child for child, of in parents.items() if of == parent]
    return below[1:]


def _wait_until(process, condition, what):
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, f"the run ended before {what}"
        assert time.monotonic() < deadline, f"no {what} in time"
        time.sleep(0.02)


def test_killed_runs_resume_and_give_the_same_student_bit_for_bit(bench, finished):
    def found(pattern):
        return list((bench / "killed").glob(pattern))

    _kill_when(_start(bench, "killed"), lambda: found("stages/targets/*/heldout/index.json"), "stored targets")
    _kill_when(_start(bench, "killed"), lambda: len(found("trials/*/*/result.json")) >= 2, "two finished trials")
    results = {p: p.stat().st_mtime_ns for p in found("trials/*/*/result.json")}
    checkpoints = "stages/distill/*/checkpoints/step-*/manifest.json"  # of another run that shares this stage
    _kill_when(_start(bench, "killed", "evaluate.tasks.0.limit=5"), lambda: found(checkpoints), "a checkpoint")
    code, shown = _minitron_in_terminal("run", "recipe.yaml", "--storage", "killed", cwd=bench)
    assert code == 0, shown
    assert "Traceback" not in shown
    # finished trials did not run again
    assert all(path.stat().st_mtime_ns == written for path, written in results.items())
    # the distillation resumed from its checkpoint, not from the start
    (key,) = [path.parent.name for path in found("runs/*/results.json")]
    written = sorted((bench / "killed" / "runs" / key / "spool").glob("*.jsonl"))
    lines = [json.loads(line) for path in written for line in path.read_text().splitlines()]
    events = [event for event in lines if event.get("key") == f"{key}.distill"]
    steps = [e["step"] for e in events if e["event"] == "metrics" and "learning_rate" in e["values"]]
    assert steps[0] in range(5, DISTILL_STEPS, 4)
    assert steps[-1] == DISTILL_STEPS
    # and the result is that of an undisturbed run: the curve, in the spool too,
    one, other = (Path(_results(bench, s)["distill"]["curve"]) for s in ("runs", "killed"))
    assert one.read_bytes() == other.read_bytes()
    assert json.loads(one.read_text())["step"] == list(range(1, DISTILL_STEPS + 1))
    assert {e["step"] for e in events if e["event"] == "metrics" and "train_kl" in e["values"]} >= set(
        range(1, DISTILL_STEPS + 1)
    )
    for name in ("pruned", "student"):
        one, other = (Path(_results(bench, s)["distill"][name]) / "model.safetensors" for s in ("runs", "killed"))
        assert one.read_bytes() == other.read_bytes()
    # one MLflow run per key, however often the driver was killed
    client = MlflowClient(f"sqlite:///{bench}/killed/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id], max_results=100)
    assert len({run.data.tags["minitron.key"] for run in runs}) == len(runs)
    runs = [run for run in runs if run.data.tags["minitron.key"].startswith(key)]
    trials = [run for run in runs if run.data.tags.get("minitron.kind") == "trial"]
    assert len(trials) == _results(bench, "killed")["search"]["candidates"]
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_a_second_process_waits_until_the_run_of_the_first_has_ended(bench, finished):
    key = run_key(load_recipe(str(bench / "recipe.yaml")))
    where = resolve_locations(str(bench / "runs"))
    arguments = command("run", "recipe.yaml", "--storage", "runs")
    with lease(where, f"run-{key}", "the run", run=key, console=Console()):
        second = subprocess.Popen(arguments, cwd=bench, env=environment(), stdout=subprocess.PIPE, text=True)
        waiting = next(line for line in second.stdout if "is held by" in line)
        assert f"process {os.getpid()}" in waiting
        assert second.poll() is None
    assert sum("already done" in line for line in second.stdout) == len(STAGES)
    assert second.wait(timeout=60) == 0


SEEN = """
import sys
from minitron_platform.cli.commands import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert not stop.code
LARGE = {"mlflow", "lm_eval", "datasets", "matplotlib", "ray", "transformers", "pandas", "pyarrow", "scipy"}
LARGE |= {"torch.distributed.tensor"}
print("imported:", *LARGE & set(sys.modules))
"""


def test_a_run_with_nothing_to_do_plans_nothing_and_imports_no_large_library_but_torch(bench, finished):
    arguments = [sys.executable, "-c", SEEN, "run", "recipe.yaml", "--storage", "runs"]
    again = subprocess.run(arguments, cwd=bench, env=environment(), capture_output=True, text=True, timeout=100)
    assert sum("already done" in line for line in again.stdout.splitlines()) == len(STAGES), again.stdout + again.stderr
    assert again.stdout.splitlines()[-1] == "imported:"
    assert "rough time" not in again.stdout


def test_the_shipped_recipes_are_listed_and_valid(tmp_path):
    listed = minitron_here("recipes", cwd=tmp_path)
    assert listed.returncode == 0
    assert "smollm2-135m-cpu" in listed.stdout


def test_a_storage_that_was_copied_or_moved_is_complete(bench, finished):
    copy, before = bench / "moved", bench / "runs"
    shutil.copytree(before, copy)
    for name in ("teacher", "data", "targets", "distill"):  # earlier versions wrote absolute paths
        for record in (copy / "stages" / name).glob("*/stage.json"):
            assert '"storage:stages/' in record.read_text()
            record.write_text(record.read_text().replace('"storage:', f'"{before}/'))
    away = before.rename(bench / "away")
    try:
        again = run_minitron("run", "recipe.yaml", "--storage", "moved", cwd=bench)
        promoted = minitron_here("promote", "tiny-student", "--storage", "moved", cwd=bench)
        listed = minitron_here("models", "--storage", "moved", cwd=bench)
        assert not before.exists()
    finally:
        away.rename(before)
    assert again.returncode == 0, again.stdout + again.stderr
    assert _reused(again) == len(STAGES)
    assert "is version 1" in promoted.stdout, promoted.stderr
    done = _results(bench, "moved")
    assert done["distill"]["student"].startswith(f"{copy}/stages/distill/")
    assert f"{copy}/stages/distill/" in listed.stdout
    assert " 2 " not in listed.stdout.splitlines()[4]
    client = MlflowClient(f"sqlite:///{copy}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "tiny"]
    (parent,) = [
        run for run in client.search_runs([experiment.experiment_id]) if run.data.tags["minitron.kind"] == "run"
    ]
    assert parent.info.artifact_uri.startswith(f"{copy}/artifacts/")
    assert "tiny-student" in Path(client.download_artifacts(parent.info.run_id, "report.html")).read_text()
