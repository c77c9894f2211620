"""A finished recipe that runs again: what is reused, also where the storage was moved or its database is gone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from helpers.command import command, environment, minitron_here, run_minitron
from helpers.finished_run import STAGES, results, reused
from mlflow import MlflowClient

from minitron_platform import load_recipe
from minitron_platform.console import Console
from minitron_platform.leases import lease
from minitron_platform.locations import resolve_locations
from minitron_platform.stages.finished import run_key
from minitron_platform.tracking.moved_database import update_addresses


def test_running_again_repeats_nothing(copied):
    before = {p: p.stat().st_mtime_ns for p in (copied / "runs" / "stages").rglob("*") if p.is_file()}
    again = minitron_here("run", "recipe.yaml", "--storage", "runs", cwd=copied)
    assert again.returncode == 0, again.stderr
    assert reused(again) == len(STAGES)
    assert before == {p: p.stat().st_mtime_ns for p in (copied / "runs" / "stages").rglob("*") if p.is_file()}
    client = MlflowClient(f"sqlite:///{copied}/runs/mlflow.db")
    assert len(client.search_model_versions("name='tiny-student'")) == 1


def test_a_changed_recipe_repeats_only_the_stages_that_depend_on_the_change(copied):
    changed = minitron_here(
        "run",
        "recipe.yaml",
        "--storage",
        "runs",
        "--set",
        "evaluate.tasks.0.limit=5",
        "--until",
        "evaluate",
        cwd=copied,
    )
    assert changed.returncode == 0, changed.stderr
    assert reused(changed) == STAGES.index("evaluate")


def test_a_deleted_mlflow_database_is_filled_again(finished, tmp_path):
    folder = finished.copy(tmp_path)
    for file in (folder / "runs").glob("mlflow.db*"):
        file.unlink()
    again = minitron_here("run", "recipe.yaml", "--storage", "runs", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert reused(again) == len(STAGES) - 1
    version = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db").get_model_version_by_alias("tiny-student", "candidate")
    assert version.source == results(folder)["distill"]["student"]


def test_a_second_process_waits_until_the_run_of_the_first_has_ended(copied):
    key = run_key(load_recipe(str(copied / "recipe.yaml")))
    where = resolve_locations(str(copied / "runs"))
    arguments = command("run", "recipe.yaml", "--storage", "runs")
    with lease(where, f"run-{key}", "the run", run=key, console=Console()):
        second = subprocess.Popen(arguments, cwd=copied, env=environment(), stdout=subprocess.PIPE, text=True)
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


def test_a_run_with_nothing_to_do_plans_nothing_and_imports_no_large_library_but_torch(copied):
    update_addresses(copied / "runs" / "mlflow.db")  # as the first run in a copy does, for which it imports more
    arguments = [sys.executable, "-c", SEEN, "run", "recipe.yaml", "--storage", "runs"]
    again = subprocess.run(arguments, cwd=copied, env=environment(), capture_output=True, text=True, timeout=100)
    assert sum("already done" in line for line in again.stdout.splitlines()) == len(STAGES), again.stdout + again.stderr
    assert again.stdout.splitlines()[-1] == "imported:"
    assert "rough time" not in again.stdout


def test_a_storage_that_was_copied_or_moved_is_complete(copied):
    copy, before = copied / "moved", copied / "runs"
    shutil.copytree(before, copy)
    for name in ("teacher", "data", "targets", "distill"):  # earlier versions wrote absolute paths
        for record in (copy / "stages" / name).glob("*/stage.json"):
            assert '"storage:stages/' in record.read_text()
            record.write_text(record.read_text().replace('"storage:', f'"{before}/'))
    away = before.rename(copied / "away")
    try:
        again = run_minitron("run", "recipe.yaml", "--storage", "moved", cwd=copied)
        promoted = minitron_here("promote", "tiny-student", "--storage", "moved", cwd=copied)
        listed = minitron_here("models", "--storage", "moved", cwd=copied)
        assert not before.exists()
    finally:
        away.rename(before)
    assert again.returncode == 0, again.stdout + again.stderr
    assert reused(again) == len(STAGES)
    assert "is version 1" in promoted.stdout, promoted.stderr
    done = results(copied, "moved")
    assert done["distill"]["student"].startswith(f"{copy}/stages/distill/")
    assert f"{copy}/stages/distill/" in listed.stdout
    assert " 2 " not in listed.stdout.splitlines()[4]
    client = MlflowClient(f"sqlite:///{copy}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "tiny"]
    key = run_key(load_recipe(str(copied / "recipe.yaml")))
    (parent,) = [run for run in client.search_runs([experiment.experiment_id]) if run.data.tags["minitron.key"] == key]
    assert parent.info.artifact_uri.startswith(f"{copy}/artifacts/")
    assert "tiny-student" in Path(client.download_artifacts(parent.info.run_id, "report.html")).read_text()
