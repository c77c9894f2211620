"""Searches beside a finished one, in its storage: a wider space, halving, a candidate that fails, and losses that diverge."""

from __future__ import annotations

import html
import json
import re
import shutil

import pytest
from helpers.command import minitron_here
from helpers.finished_run import STAGES, results, reused
from mlflow import MlflowClient

from minitron import Architecture
from minitron_platform.report.candidates import findings
from minitron_platform.stages.search_output import SearchOutput


def _diverging(section):
    """Settings with which each step makes every weight a thousand times as large."""
    return [f"--set={section}.{key}" for key in ("peak_lr=10", "min_lr=10", "weight_decay=100")]


@pytest.mark.long
def test_a_run_that_diverges_stops_and_names_the_step(copied, ray_here):
    steep = ["--set=resources.workers=1", *_diverging("distill")]
    stopped = minitron_here("run", "recipe.yaml", "--storage", "runs", *steep, cwd=copied)
    assert stopped.returncode == 2, stopped.stdout + stopped.stderr
    assert "at step" in stopped.stderr
    assert "learning rate" in stopped.stderr
    assert reused(stopped) == STAGES.index("distill")
    few = "--set=family.0.space={num_layers: [4], hidden_size: [36], intermediate_size: [48, 72]}"
    steep = [few, "--set=resources.cpus_per_trial=2", *_diverging("search.training")]
    stopped = minitron_here("run", "recipe.yaml", "--storage", "runs", *steep, cwd=copied)
    assert stopped.returncode == 2, stopped.stdout + stopped.stderr
    said = stopped.stderr.splitlines()
    (first,) = [number for number, line in enumerate(said) if "no candidate of the search finished" in line]
    lines = said[first + 1 : first + 3]
    assert len(lines) == 2
    assert all(" hidden · " in line and "at step" in line and "learning rate" in line for line in lines)
    assert "Traceback" not in stopped.stderr + stopped.stdout
    client = MlflowClient(f"sqlite:///{copied}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("tiny").experiment_id
    failed = client.search_runs([experiment], "tags.`minitron.kind` = 'run' AND attributes.status = 'FAILED'")
    assert len(failed) == 2
    for run in failed:  # which recipe has failed is known
        assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["recipe.yaml"]


def test_a_wider_space_distils_only_the_new_candidates(copied, ray_here):
    before = {p: p.stat().st_mtime_ns for p in (copied / "runs" / "trials").glob("*/*/result.json")}
    stored = {p: p.stat().st_mtime_ns for p in (copied / "runs" / "stages" / "targets").rglob("*") if p.is_file()}
    wider = ["--set", "family.0.tolerance=0.5", "--set", "resources.cpus_per_trial=2", "--until", "search"]
    again = minitron_here("run", "recipe.yaml", "--storage", "runs", *wider, cwd=copied)
    assert again.returncode == 0
    assert reused(again) == STAGES.index("search")  # the teacher does not run again
    assert stored == {p: p.stat().st_mtime_ns for p in (copied / "runs/stages/targets").rglob("*") if p.is_file()}
    after = {p: p.stat().st_mtime_ns for p in (copied / "runs" / "trials").glob("*/*/result.json")}
    assert len(after) > len(before)
    assert before.items() <= after.items()


def test_a_failed_candidate_is_reported_with_its_reason_and_the_run_continues(finished, copied, ray_here):
    shutil.copytree(finished.folder / "runs", copied / "failing")
    shutil.rmtree(copied / "failing" / "stages" / "search")
    failing = next(
        r["architecture"] for r in reversed(results(finished.folder)["search"]["ranking"]) if not r["winner"]
    )
    name = str(Architecture.from_dict(failing))
    for path in (copied / "failing").glob("trials/*/*/result.json"):
        if json.loads(path.read_text())["architecture"] == failing:
            path.unlink()
            damaged = path.with_name("undistilled.json")
            damaged.write_text("{}")  # its trial raises when it reads this file
    result = minitron_here(
        "run", "recipe.yaml", "--storage", "failing", "--set", "resources.max_failures=1", cwd=copied
    )
    assert result.returncode == 0, result.stdout + result.stderr
    reason = f"{damaged}: not a trial's file (KeyError: 'kl'); delete the file and run again"
    retried = f"{reason}; resumed from step 0, 0 restarts left"
    assert re.search(rf"restart {re.escape(name)} on .*: {re.escape(retried)}", result.stdout)
    assert f"failed  {name}: {reason}" in result.stdout
    assert ", 1 failed" in result.stdout
    newest = max((copied / "failing" / "runs").glob("*/results.json"), key=lambda path: path.stat().st_mtime_ns)
    found = json.loads(newest.read_text())["family"]["tiny-student"]["search"]
    assert found["failures"] == [{"architecture": failing, "reason": reason}]
    assert found["winner"] == results(finished.folder)["search"]["winner"]
    page = html.unescape(newest.with_name("report.html").read_text())
    assert f'<th scope="row">{name}</th><td class="text">{reason}</td>' in page
    assert f'<td class="text">{reason}</td><td>0</td><td>0</td>' in page.partition("<h2>Restarts</h2>")[2]
    client = MlflowClient(f"sqlite:///{copied}/failing/mlflow.db")
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

    # a driver that goes on with the search knows the restarts of the one before, and numbers its own after them
    shutil.rmtree(copied / "failing" / "stages" / "search")
    again = minitron_here(
        "run",
        "recipe.yaml",
        "--storage",
        "failing",
        "--set",
        "resources.max_failures=1",
        "--until",
        "search",
        cwd=copied,
    )
    assert again.returncode == 0, again.stdout + again.stderr
    (record,) = (copied / "failing/stages/search").glob("*/stage.json")
    both = json.loads(record.read_text())["outputs"]["restarts"]
    assert [restart["what"] for restart in both] == [name] * 2
    tags = client.get_run(trial.info.run_id).data.tags
    assert [retried in tags[f"minitron.restart.{number}"] for number in (1, 2)] == [True, True]
    assert client.get_run(trial.info.run_id).data.metrics["restarts"] == 2


def test_a_search_with_halving_reports_how_early_the_order_was_known(finished, copied, ray_here):
    before = {p: p.stat().st_mtime_ns for p in (copied / "runs" / "trials").glob("*/*/*.json")}
    early = ["--set", "search.forward.keep=4", "--set", "search.halving.keep=0.5", "--until", "search"]
    result = minitron_here("run", "recipe.yaml", "--storage", "runs", *early, cwd=copied)
    assert result.returncode == 0, result.stdout + result.stderr
    records = [json.loads(p.read_text())["outputs"] for p in (copied / "runs/stages/search").glob("*/stage.json")]
    (stopping,) = [record for record in records if record["stopped"]]
    (whole,) = [
        record for record in records if record["fingerprint"] == results(finished.folder)["search"]["fingerprint"]
    ]
    assert len(stopping["stopped"]) == len(stopping["ranking"]) == 2
    assert "2 stopped early, 2 of" in result.stdout
    assert sum(row["distilled"] for row in stopping["forward"]) == 4
    # it shares the trials of the search without halving, whose report says what stopping would have saved
    assert before == {p: p.stat().st_mtime_ns for p in (copied / "runs" / "trials").glob("*/*/*.json")}
    assert [row["measure"] for row in whole["stability"]][3:] == ["KL at step 3", "KL at step 5"]
    page = html.unescape(next((copied / "runs" / "runs").glob("*/report.html")).read_text())
    assert all(sentence in page for sentence in findings(SearchOutput.model_validate(whole)))
    assert all(f"{row['tau']:.2f}" in page for row in whole["stability"])
    (stops,) = [
        sentence
        for sentence in findings(SearchOutput.model_validate(stopping))
        if "stopped early at a rung" in sentence
    ]
    assert f"2 were stopped early at a rung, which saved {2 / 24:.0%}" in stops
