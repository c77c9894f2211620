"""Runs that are killed or stopped, and go on."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.command import command, environment
from helpers.finished_run import results
from helpers.tiny import DISTILL_STEPS
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM

STOPPED = "stopped; to resume: "


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


def _start(folder, storage, *settings, until="register"):
    """Start the run of the recipe in `folder`; what it says is appended to a file with the name of the storage."""
    log = open(folder / f"{storage}.log", "a")  # noqa: SIM115 (lives as long as the process)
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
        cwd=folder,
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


def _stop(process, number, log):
    """Send a signal to a run; returns its exit code and what it has said since the last call."""
    process.send_signal(number)
    code, said = process.wait(timeout=90), log.read_text()
    log.write_text("")
    return code, said


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


@pytest.fixture(scope="module")
def stopped(finished, tmp_path_factory):
    """The storage of a run that was stopped in its search, and stopped again while it started; and what was seen of these two
    processes. Its recipe is that of `finished`."""
    folder, seen = tmp_path_factory.mktemp("stopped"), SimpleNamespace()
    shutil.copy(finished.folder / "recipe.yaml", folder)
    storage, log = folder / "stopped", folder / "stopped.log"
    process = _start(folder, "stopped")
    _wait_until(process, lambda: list(storage.glob("trials/*/*/result.json")), "a finished trial")
    seen.in_search = _stop(process, signal.SIGTERM, log)
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    seen.status = {run.info.run_name: run.info.status for run in runs}
    process = _start(folder, "stopped")
    _wait_until(process, lambda: "Minitron" in log.read_text(), "output")
    seen.at_start = _stop(process, signal.SIGINT, log)
    return storage, seen


def test_sigterm_stops_a_search_and_ctrl_c_a_start_and_both_say_how_to_resume(stopped):
    storage, seen = stopped
    code, said = seen.in_search
    assert code == 143, said
    _, last = said.split(STOPPED)
    assert " run recipe.yaml --storage stopped --until register" in last.splitlines()[0]
    assert len(last.splitlines()) == 1
    assert "Traceback" not in said
    assert "SIGTERM" not in said  # Ray's stack begins with it
    assert not list(storage.glob("stages/search/*/stage.json"))
    status = dict(seen.status)
    assert status.pop("search") == "KILLED"
    assert status.pop(next(name for name in status if name.startswith("tiny"))) == "KILLED"  # the whole run
    assert {status[name] for name in ("data", "calibrate", "targets")} == {"FINISHED"}
    assert "RUNNING" not in status.values(), status
    code, said = seen.at_start
    assert code == 130, said
    assert STOPPED in said
    assert "Traceback" not in said


def test_killed_runs_resume_and_give_the_same_student_bit_for_bit(finished, stopped):
    storage, _ = stopped
    folder = storage.parent
    trial_results = {path: path.stat().st_mtime_ns for path in storage.glob("trials/*/*/result.json")}
    checkpoints = "stages/distill/*/checkpoints/step-*/manifest.json"  # of another run that shares this stage
    process = _start(folder, "stopped", "evaluate.tasks.0.limit=5")
    _kill_when(process, lambda: list(storage.glob(checkpoints)), "a checkpoint")
    code, shown = _minitron_in_terminal("run", "recipe.yaml", "--storage", "stopped", cwd=folder)
    assert code == 0, shown
    assert "Traceback" not in shown
    # finished trials did not run again
    assert trial_results
    assert all(path.stat().st_mtime_ns == written for path, written in trial_results.items())
    # the distillation resumed from its checkpoint, not from the start
    (key,) = [path.parent.name for path in storage.glob("runs/*/results.json")]
    written = sorted((storage / "runs" / key / "spool").glob("*.jsonl"))
    lines = [json.loads(line) for path in written for line in path.read_text().splitlines()]
    events = [event for event in lines if event.get("key") == f"{key}.distill"]
    steps = [e["step"] for e in events if e["event"] == "metrics" and "learning_rate" in e["values"]]
    assert steps[0] in range(5, DISTILL_STEPS, 4)
    assert steps[-1] == DISTILL_STEPS
    # and the result is that of an undisturbed run: the curve, in the spool too,
    undisturbed, resumed = results(finished.folder), results(folder, "stopped")
    one, other = (Path(stages["distill"]["curve"]) for stages in (undisturbed, resumed))
    assert one.read_bytes() == other.read_bytes()
    assert json.loads(one.read_text())["step"] == list(range(1, DISTILL_STEPS + 1))
    assert {e["step"] for e in events if e["event"] == "metrics" and "train_kl" in e["values"]} >= set(
        range(1, DISTILL_STEPS + 1)
    )
    for name in ("pruned", "student"):
        one, other = (Path(stages["distill"][name]) / "model.safetensors" for stages in (undisturbed, resumed))
        assert one.read_bytes() == other.read_bytes()
    # one MLflow run per key, however often the driver was killed
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id], max_results=100)
    assert len({run.data.tags["minitron.key"] for run in runs}) == len(runs)
    runs = [run for run in runs if run.data.tags["minitron.key"].startswith(key)]
    trials = [run for run in runs if run.data.tags.get("minitron.kind") == "trial"]
    assert len(trials) == resumed["search"]["candidates"]
    assert {run.info.status for run in runs} == {"FINISHED"}


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
    assert {p.step for p in client.get_metric_history(distilled.info.run_id, "heldout_kl")} == {8, 12, 16, 24}
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
    assert f"resumed from step {restart['step']}, 2 workers\n" in shown
    assert distilled.data.metrics["restarts"] == 1
    assert f"{said}; resumed from step {restart['step']}, 2 restarts left" in distilled.data.tags["minitron.restart.1"]
