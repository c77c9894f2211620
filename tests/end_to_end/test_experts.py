"""A mixture whose candidates differ in the number of experts alone: plan, report, MLflow and storage tell them apart."""

from __future__ import annotations

import html
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from helpers import scraped_run, tiny
from helpers.command import ROOT, environment, minitron_here
from helpers.report_page import ReportPage
from mlflow import MlflowClient

from minitron.models import load_tokenizer
from minitron_platform.monitoring import METRICS
from minitron_platform.stages.search_output import SearchOutput
from minitron_search.trial_store import trial_result

EXPERTS = {2, 3}


class Mixture(NamedTuple):
    """What `minitron plan` and `minitron run` printed, the storage, and the metrics at Ray's endpoint."""

    planned: str
    printed: str
    storage: Path
    during: dict[Any, float]
    after: dict[Any, float]


@pytest.fixture(scope="module")
def mixture(bench, empty_database):
    """A run whose metrics are scraped in the middle of the distillation and after the end."""
    teacher = bench / "mixture"
    tokenizer = tiny.tokenizer()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    tiny.model("qwen3_moe", **sizes).save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    values = yaml.safe_load((bench / "recipe.yaml").read_text())
    values |= {"name": "mixture", "experiment": "mixture", "evaluate": {"tasks": []}}
    values["teacher"]["model"] = str(teacher)
    values["data"]["add_bos"] = True  # which its tokenizer does not
    values["calibrate"] = {"rows": 8}
    member = {
        "model": "tiny-mixture",
        "parameters": 56_000,
        "tolerance": 0.1,
        "space": {"num_experts": sorted(EXPERTS)},
    }
    values["family"] = [member]
    values["search"]["training"] |= {"steps": 2, "warmup_steps": 1}
    values["distill"] |= {"steps": 2, "warmup_steps": 1, "evaluate_every": 1}
    values["resources"] = {"workers": 1, "cpus_per_trial": 2}
    (bench / "mixture.yaml").write_text(yaml.safe_dump(values))
    (bench / "mixture-runs").mkdir()
    shutil.copy(empty_database, bench / "mixture-runs")
    planned = minitron_here("plan", "mixture.yaml", "--storage", "mixture-runs", cwd=bench)
    assert planned.returncode == 0, planned.stderr
    # Ray takes the metrics of its processes every 10 seconds otherwise
    every_second = {**environment(), "RAY_metrics_report_interval_ms": "1000"}
    every_second["PYTHONPATH"] += f"{os.pathsep}{ROOT / 'tests'}"
    command = [sys.executable, "-m", scraped_run.__name__]
    done = subprocess.run(command, cwd=bench, env=every_second, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    said = json.loads((bench / "scraped.json").read_text())
    during, after = (
        {(name, *map(tuple, tags)): value for (name, *tags), value in said[when]} for when in ("during", "after")
    )
    return Mixture(planned.stdout, said["printed"], bench / "mixture-runs", during, after)


def test_the_students_tokenizer_begins_texts_as_the_student_was_trained(mixture, bench):
    teacher = load_tokenizer(bench / "mixture")
    [student] = mixture.storage.glob("stages/distill/*/student")
    assert load_tokenizer(student).encode("river") == [teacher.bos_token_id, *teacher.encode("river")]
    card = (student / "README.md").read_text()
    assert "- text begins with the BOS token (data.add_bos: true), which its tokenizer adds" in card


def _value(found, name, part):
    """The value of a metric of a part; None if there is none."""
    values = [v for (n, *tags), v in found.items() if n == f"ray_minitron_{name}" and ("part", part) in tags]
    return values[0] if values else None


def _stored(storage):
    (path,) = storage.glob("stages/search/*/stage.json")
    outputs = json.loads(path.read_text())["outputs"]
    return {**outputs, "trials": str(storage / outputs["trials"].removeprefix("storage:"))}


def test_the_plan_has_a_column_for_experts(mixture):
    (header,) = [line for line in mixture.planned.splitlines() if "GFLOP/tok" in line]
    columns = [cell.strip() for cell in header.split("┃")]
    position = columns.index("experts")
    lines = mixture.planned.partition(header)[2].splitlines()
    cells = [line.split("│") for line in lines if line.count("│") == header.count("┃")]
    assert {int(row[position]) for row in cells} == EXPERTS


def test_the_report_and_mlflow_tell_the_candidates_apart(mixture):
    shown, storage = mixture.printed, mixture.storage
    page = html.unescape(next(storage.glob("runs/*/report.html")).read_text())
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'mixture'")
    trials = client.search_runs([experiment.experiment_id], "tags.`minitron.kind` = 'trial'")
    assert {int(trial.data.params["num_experts"]) for trial in trials} == EXPERTS
    assert len({trial.info.run_name for trial in trials}) == len(EXPERTS)
    for trial in trials:  # every metric of a step is recorded
        assert {"flop_utilisation", "seconds_data", "grad_norm"} <= trial.data.metrics.keys()
    for count in EXPERTS:
        assert f"· {count} experts" in page
        assert f"· {count} experts" in shown
    output = SearchOutput.model_validate(_stored(storage))
    assert {candidate.architecture.label()[-2:] for candidate in output.ranking} == {
        "2e",
        "3e",
    }  # the labels of the report's bars


def test_a_search_stored_by_an_earlier_version_is_read(mixture):
    stored = _stored(mixture.storage)
    output = SearchOutput.model_validate(stored)
    assert SearchOutput.model_validate(output.model_dump(mode="json")) == output
    texts = {str(candidate.architecture): candidate for candidate in output.ranking}
    earlier = {
        **stored,
        "ranking": [
            {**row, "architecture": text, "num_layers": 2, "benchmarks": None, "arc": 0.25, "arc_stderr": None}
            for text, row in zip(texts, stored["ranking"], strict=True)
        ],
        "forward": [
            {"architecture": text, "num_layers": 2, "kl_undistilled": 1.0, "distilled": True, "parameters": 1}
            for text in [*texts, str(output.winner).replace(f"{output.winner.num_experts} experts", "4 experts")]
        ],
        "failures": {next(iter(texts)): "why"},
        "benchmarks": ["arc"],
        "metrics": {"arc": "acc"},
        "stability": [
            {**row, "step": None if row["step"] is None else float(row["step"])} for row in stored["stability"]
        ],
    }
    read = SearchOutput.model_validate(earlier)
    assert [candidate.architecture for candidate in read.ranking] == [c.architecture for c in output.ranking]
    assert read.ranking[0].score("arc").metric == "acc"
    assert read.forward[-1].architecture.num_experts == 4
    assert read.failures[0].architecture == output.ranking[0].architecture
    assert read.winner == output.winner


def test_running_again_reads_the_finished_trials(mixture, bench, ray_here):
    storage = mixture.storage
    before = {path: path.stat().st_mtime_ns for path in storage.glob("trials/*/*/*.json")}
    (record,) = storage.glob("stages/search/*/stage.json")
    record.unlink()
    again = minitron_here("run", "mixture.yaml", "--storage", "mixture-runs", "--until", "search", cwd=bench)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {path: path.stat().st_mtime_ns for path in storage.glob("trials/*/*/*.json")} == before
    output = SearchOutput.model_validate(_stored(storage))
    for candidate in output.ranking:
        assert trial_result(output.trials, candidate.architecture).kl == candidate.kl
    assert Path(output.trials).parent == storage / "trials"


def test_the_report_shows_the_held_out_rows_before_during_and_after_the_distillation(mixture):
    page = ReportPage(next(mixture.storage.glob("runs/*/report.html")).read_text())
    (rows,) = [chart["rows"] for chart in page.charts.values() if chart["rows"][0].get("kind") == "train"]
    points = {row["tokens"]: row for row in rows if row["kind"] == "heldout"}
    assert sorted(points) == [step * 4 * 32 for step in (0, 1, 2)]
    assert all(point["kl"] > 0 and point["loss"] > 0 for point in points.values())


def test_the_metrics_of_a_run_appear_at_rays_endpoint(mixture):
    values = {name: _value(mixture.during, name, "distill") for name in ("step", "tokens", "running")}
    assert values == {"step": 1, "tokens": 128, "running": 1}
    assert _value(mixture.during, "tokens_per_second", "distill") > 0
    assert _value(mixture.during, "running", "") == 1
    found = mixture.after
    assert {name for name, *_ in found} == {f"ray_minitron_{name}" for name in METRICS}
    value = {key[0].removeprefix("ray_minitron_"): value for key, value in found.items() if ("part", "distill") in key}
    assert (value["step"], value["tokens"], value["tokens_per_second"], value["running"]) == (2, 256, 0, 0)
    assert value["train_kl"] > 0
    assert value["stage_seconds"] > 0
    speeds = {dict(tags)["part"] for name, *tags in found if name == "ray_minitron_tokens_per_second"}
    assert "distill" in speeds
    assert not speeds & {"data", "calibrate", "evaluate"}  # which train nothing
    assert found["ray_minitron_parts", ("kind", "trial"), ("state", "finished")] == len(EXPERTS)
    assert found["ray_minitron_parts", ("kind", "trial"), ("state", "running")] == 0
