"""The group of workers that serves all stages of a run, on a cluster of a head and two nodes."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
import torch
import torch.distributed as dist
from helpers.cluster import drain, two_nodes
from helpers.command import minitron_here
from helpers.evaluating import write_jsonl
from ray import cloudpickle
from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig
from ray.experimental import internal_kv
from ray.util.placement_group import placement_group, remove_placement_group

from minitron.errors import InputError, MinitronError
from minitron.evaluation.result_file import read_results
from minitron_platform.cluster import watch
from minitron_platform.cluster.watch import ClusterWatch
from minitron_platform.console import Console
from minitron_platform.doctor.cluster import findings_of_cluster
from minitron_platform.doctor.finding import has_failed
from minitron_platform.pipeline import run
from minitron_platform.planning.plan import plan
from minitron_platform.recipes.load import load_recipe
from minitron_platform.recipes.resources import ResolvedResources
from minitron_platform.stages import data
from minitron_platform.workers import group as group_module
from minitron_platform.workers import parts
from minitron_platform.workers.group import WorkerGroup
from minitron_platform.workers.worker import WorkersFailed, WorkerStarted
from minitron_platform.workers.workers import Workers
from minitron_search import elastic


@dataclass(frozen=True)
class Job:
    """What the functions below are called with. folder: where they leave files."""

    folder: str
    fail: str = ""

    def file(self, name):
        return Path(self.folder, name)


def identify(job, worker):
    """(process, rank, number of processes) of the first process."""
    total = torch.tensor(worker.rank + 1)
    if worker.count > 1:
        dist.all_reduce(total)
    job.file(f"{os.getpid()}").write_text(str(worker.rank))
    worker.send(("seen", int(total)))
    worker.progress.counter("rows")(1, 2)
    return os.getpid(), worker.rank, worker.count


def fail(job, worker):
    """Fails as `job.fail` says; each attempt leaves a file."""
    job.file(f"attempt-{len(list(Path(job.folder).glob('attempt-*')))}").touch()
    if job.fail == "input":
        raise InputError("rows: none", "give some")
    os.kill(os.getpid(), signal.SIGKILL)


def work(job, worker):
    """Ends when there is a file `end`, and says so to all processes. Tells when it can be interrupted, if there is a file
    `saved`, and whether its node is being taken away."""
    job.file(f"began-{worker.count}-{worker.rank}-{time.time_ns()}").touch()
    done = torch.zeros(2)
    while not done[0]:
        time.sleep(0.05)
        done = torch.tensor([float(job.file("end").exists()), float(worker.is_leaving())])
        if worker.count > 1:
            dist.all_reduce(done)
        if done[1] and worker.is_first:
            job.file("hurried").touch()
        if worker.is_first and job.file("saved").exists():
            worker.resumable()
    return worker.count


@pytest.fixture(scope="module")
def cluster():
    """A cluster with a head that computes nothing and two nodes for one worker each."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
    preemption = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
    with two_nodes(**preemption) as made:
        yield made


def _group(folder, count=2, **options):
    given = {"threads": 1, "max_failures": 1, "scratch": str(folder / "ray")} | options
    return WorkerGroup(count, {"CPU": 1.0}, **given)


def _wait_until(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_same_processes_serve_one_call_after_another(cluster, tmp_path):
    group = _group(tmp_path, scratch="memory://workers")  # a kind of address that Ray Train itself does not know
    job = Job(str(tmp_path))
    events = []
    process, rank, count = group.run(identify, job, events.append)
    assert (rank, count) == (0, 2)
    assert ("seen", 3) in events
    assert {event.rank for event in events if isinstance(event, WorkerStarted)} == {0, 1}
    processes = {path.name: path.read_text() for path in tmp_path.iterdir() if path.name.isdigit()}
    assert set(processes.values()) == {"0", "1"}
    # the processes beside them have no use for torch, whose import takes a second of CPU, nor the first for Ray Train
    assert not _imported(group.calls) & {"torch", "transformers", "pandas", "ray.train"}
    (controller,) = map(cloudpickle.loads, ray.get(group.calls.controllers.remote()))
    assert not _imported(controller) & {"torch", "transformers", "mlflow"}

    # only the first of them, and a failure of one call does not count for the next
    assert group.run(identify, job, events.append, everywhere=False) == (process, 0, 1)
    console = Console()
    console.rich.file = io.StringIO()
    workers = Workers(console, start_ray=lambda: None, computes_here=lambda: False, scratch=str(tmp_path / "ray"))
    workers._group = group
    stored = []
    with workers.storing(stored.append):
        assert workers.compute(die_once, job, everywhere=False) == "went on"
    shown = " ".join(console.rich.file.getvalue().split())  # as a stage shows it
    assert re.search(r"failed worker 0 on \S+ \(.*\): its process was killed .*; restarting, 0 restarts left", shown)
    assert [(one.what, one.left, str(one).endswith("; started again, 0 restarts left")) for one in stored] == [
        ("worker 0", 0, True)
    ]
    with pytest.raises(MinitronError, match="failed too often"):
        group.run(fail, job, events.append, everywhere=False)
    failures = [event for event in events if isinstance(event, WorkersFailed)]
    assert [event.restarted for event in failures] == [True, False]
    assert all(event.ranks == (0,) and "killed" in event.reason for event in failures)
    assert not group.is_open
    group.close()
    assert not (tmp_path / "ray").exists()


def _imported(actor):
    """Names of the modules that an actor of Ray has imported."""
    return set(ray.get(actor.__ray_call__.remote(lambda self: list(sys.modules)), timeout=60))


def die_once(job, worker):
    """Dies in the first attempt."""
    if not job.file("died").exists():
        job.file("died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "went on"


def test_an_error_of_the_input_is_not_tried_again(cluster, tmp_path):
    group = _group(tmp_path, count=1)
    with pytest.raises(InputError, match="rows: none"):
        group.run(fail, Job(str(tmp_path), "input"), lambda event: None, everywhere=False)
    assert len(list(tmp_path.glob("attempt-*"))) == 1
    group.close()


def test_models_are_evaluated_by_the_workers_of_a_cluster_as_by_one_process(cluster, bench, tmp_path, monkeypatch):
    lines = [json.loads(line) for line in (bench / "arc.jsonl").read_text().splitlines()]
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"data/arc_easy/{split}.jsonl", lines)
    command = ("evaluate", bench / "teacher", "--tasks", "arc_easy:2", "--data", "data", "--dtype", "float32")
    alone = minitron_here(*command, "--storage", "alone", "--out", "alone.json", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr

    def fail(*_, **__):
        raise AssertionError("computed in the driver")

    monkeypatch.setattr("minitron.evaluation.continuations._hidden", fail)
    there = ("--address", "auto", "--storage", "there", "--upload")
    done = minitron_here(*command, *there, "--workers", "2", "--out", "there.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "uploading model: " in done.stdout
    assert [folder.name for folder in (tmp_path / "there").iterdir()] == ["answers", "uploads"]
    (one,), (other,) = (read_results(str(tmp_path / name)) for name in ("alone.json", "there.json"))
    assert (one.tasks, one.identity, one.engine) == (other.tasks, other.identity, "transformers")

    many = minitron_here(*command, *there, "--workers", "9", cwd=tmp_path)
    assert (many.returncode, "--workers: 9 need 9 CPUs together, and there are " in many.stderr) == (2, True)


def test_a_plan_counts_the_nodes_of_a_cluster_and_those_that_its_autoscaler_may_start(cluster, bench, tmp_path):
    recipe = load_recipe(bench / "recipe.yaml", ["resources.workers=8", "distill.batch_rows=8"])
    with pytest.raises(
        InputError, match=r"resources\.workers: 8 need 8 CPUs and 0 GPUs together, and the cluster has [23] and 0"
    ):
        plan(recipe, storage_path=tmp_path, address=cluster.address)
    group = NodeGroupConfig(name="cpus", resources={"CPU": 4}, max_count=2)
    told = ClusterConfig(node_group_configs=[group]).SerializeToString()
    key, namespace = b"__autoscaler_cluster_config", b"__autoscaler"  # where Ray's autoscaler says what it may start
    internal_kv._internal_kv_put(key, told, overwrite=True, namespace=namespace)
    try:
        planned = plan(recipe, storage_path=tmp_path, address=cluster.address)
    finally:
        internal_kv._internal_kv_del(key, namespace=namespace)
    assert planned.resources.workers == 8
    assert "CPUs are there now, the autoscaler may start the others" in planned.resources_text


def test_a_node_without_the_main_memory_for_a_recipe_is_refused_before_anything_is_computed(cluster, bench, tmp_path):
    of_gpus = {"workers": 1, "gpus_per_worker": 1, "gpu_memory_bytes": "80e9"}
    settings = [f"resources.{key}={value}" for key, value in of_gpus.items()]
    recipe = load_recipe(bench / "recipe.yaml", [*settings, "teacher.dtype=float32"])
    # Ray believes what it is told of a node's devices
    node = cluster.add_node(num_cpus=1, num_gpus=1, memory=10**9, object_store_memory=10**8)
    try:
        for start in (plan, run):
            with pytest.raises(
                InputError, match=r"a node needs .* of main memory, and has 1\.1 GB\n.*more main memory"
            ):
                start(recipe, storage_path=tmp_path, address=cluster.address)
    finally:
        cluster.remove_node(node)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["text", pytest.param("python-docs", marks=pytest.mark.long)])
def test_a_worker_packs_a_small_text_and_the_driver_only_that_of_its_own_python(
    cluster, bench, tmp_path, monkeypatch, capsys, empty_database, kind
):
    own_pack, calls = data.pack, []
    monkeypatch.setattr(data, "pack", lambda *args, **options: calls.append(1) or own_pack(*args, **options))
    monkeypatch.setattr(data, "python_identity", lambda: {"python": "another"})
    documentation = ["data.kind=python-docs", "data.path=''"] if kind == "python-docs" else []
    recipe = load_recipe(bench / "recipe.yaml", ["resources.workers=1", *documentation])
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    run(recipe, storage_path=tmp_path, address=cluster.address, until="data")
    assert len(list(tmp_path.glob("**/rows/manifest.json"))) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "packed" in said
    assert [len(calls), "the workers have other Python packages" in said] == [kind == "python-docs"] * 2


@pytest.mark.long
def test_the_doctor_looks_at_every_node_and_measures_between_them(cluster, tmp_path):
    findings = list(findings_of_cluster(cluster.address, str(tmp_path)))
    nodes = 1 + len(cluster.worker_nodes)
    checks = Counter((finding.check, finding.state) for finding in findings)
    assert checks["storage", "ok"] + checks["storage", "warning"] == nodes  # a busy machine may be slow
    assert checks["clock", "ok"] == nodes
    assert [finding.value.split(",")[0] for finding in findings if finding.check == "all-reduce"] == ["gloo"]
    assert not has_failed(findings)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def impatient(monkeypatch):
    """A console and a list of its notes, where a run that waits for room looks five times a second and says so at once."""
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(watch, "PATIENCE", 0.0)
    console, notes = Console(), []
    monkeypatch.setattr(console, "note", lambda text: notes.append(text() if text else None))
    return console, notes


@pytest.mark.parametrize(("least", "awaited"), [(None, 4), (3, 3)], ids=["fixed", "elastic"])
def test_a_group_that_waits_for_room_says_for_what_and_gives_up_in_the_end(
    cluster, tmp_path, monkeypatch, impatient, least, awaited
):
    monkeypatch.setattr(group_module, "LOOK_SECONDS", 0.2)
    console, notes = impatient
    resources = ResolvedResources(1, 1, 0, 4, cpus_per_worker=1, gpus_per_worker=0, max_failures=1, least_workers=least)
    workers = Workers(
        console,
        start_ray=lambda: resources,
        computes_here=lambda: False,
        scratch=str(tmp_path / "ray"),
        look=ClusterWatch(console, 1.0).look,
    )
    missing = f"{awaited - len(cluster.worker_nodes)} of {awaited} CPUs"
    with pytest.raises(MinitronError, match=f"has not given {missing} within 1 s") as gave_up:
        workers.compute(identify, Job(str(tmp_path)))
    assert console._status() == "starting workers"
    assert "lower the numbers in resources" in gave_up.value.remedy
    assert f"waiting for {missing}, requested 1 s ago" in notes
    started = time.monotonic()
    workers.close()
    assert time.monotonic() - started < 15  # Ray Train does not wait any more
    _wait_until(lambda: not watch._requested())  # Ray does not either


def until_file(path, part):
    """Ends when there is a file `path`."""
    while not os.path.exists(path):
        time.sleep(0.05)
    return part


def test_tasks_that_wait_for_room_say_for_what_and_give_up_in_the_end_and_those_that_run_may_take_longer(
    cluster, tmp_path, monkeypatch, impatient
):
    monkeypatch.setattr(parts, "LOOK_SECONDS", 0.2)
    console, notes = impatient
    options = {"max_failures": 0, "say": notes.append}
    end = tmp_path / "end"
    count = len(cluster.worker_nodes)
    others = placement_group([{"CPU": 1}] * count)  # all CPUs are somebody else's
    assert others.wait(60)
    try:
        with pytest.raises(MinitronError, match=f"has not given {count} CPUs within 1 s, which resources.wait_timeout"):
            list(parts.run_parts(until_file, str(end), range(9), look=ClusterWatch(console, 1.0).look, **options))
    finally:
        remove_placement_group(others)
    assert f"waiting for {count} CPUs, requested 1 s ago" in notes

    # a timeout that passes several times while the tasks run
    looks = []
    watching = ClusterWatch(console, 60.0)

    def look(tasks=()):
        if not tasks:  # a worker has begun
            looks.append(len(looks))
            watching.timeout = 0.0
        if len(looks) == 5:
            end.touch()
        watching.look(tasks)

    assert list(parts.run_parts(until_file, str(end), range(3), look=look, **options)) == [0, 1, 2]


@pytest.mark.long
def test_a_group_shrinks_with_the_cluster_grows_at_a_checkpoint_and_hears_of_nodes_that_leave(
    cluster, tmp_path, monkeypatch
):
    monkeypatch.setattr(elastic, "RESIZE_SECONDS", 1.0)
    console = Console()
    console.rich.file = io.StringIO()
    look = ClusterWatch(console).look
    group = _group(tmp_path, least=1)
    job = Job(str(tmp_path))
    results, events = [], []
    caller = threading.Thread(target=lambda: results.append(group.run(work, job, events.append, look=look)))
    caller.start()
    try:
        _wait_until(lambda: len(list(tmp_path.glob("began-2-*"))) == 2)
        lost = sorted(cluster.worker_nodes, key=lambda node: node.node_id)[0]
        cluster.remove_node(lost, allow_graceful=False)
        _wait_until(lambda: list(tmp_path.glob("began-1-0-*")), 60)  # Ray alone waits 60 s for the lost CPU
        assert [type(event) for event in events if isinstance(event, WorkersFailed)] == [WorkersFailed]

        added = cluster.add_node(num_cpus=1)
        (tmp_path / "saved").touch()  # from now on a restart would lose nothing
        _wait_until(lambda: len(list(tmp_path.glob("began-2-*"))) == 4)
        grown = sorted(int(path.name.rsplit("-", 1)[1]) for path in tmp_path.glob("began-2-*"))[2]
        assert grown > (tmp_path / "saved").stat().st_mtime_ns
        assert len([event for event in events if isinstance(event, WorkersFailed)]) == 1  # growing is no failure

        drain(added.node_id)
        _wait_until(lambda: (tmp_path / "hurried").exists())
    finally:
        (tmp_path / "end").touch()
        caller.join(60)
    assert len(results) == 1
    group.close()
    said = console.rich.file.getvalue().splitlines()
    assert ["(1 CPUs); its processes start again on other nodes" in line for line in said if "lost" in line] == [True]
    assert ["(1 CPUs)" in line for line in said if "joined" in line] == [True]
