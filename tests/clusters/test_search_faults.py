"""A search whose driver, worker or node is killed in the middle of a trial, on a cluster of a head and two nodes."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from helpers.cluster import drain, two_nodes
from helpers.searching import json_files, search_task
from ray.exceptions import OutOfMemoryError, RayActorError

from minitron_search import search
from minitron_search.events import Failed, Leaving, Progress, Retried, Started
from minitron_search.pool import Pool
from minitron_search.trial import run_trial
from minitron_search.trial_store import trial_key

LONG = {"steps": 120, "checkpoint_every": 5}
KILLED_AT = 25


@pytest.fixture(scope="module")
def candidates(made):
    return made[2][:3]


@pytest.fixture(scope="module")
def undisturbed(made, candidates, tmp_path_factory):
    """The ranking of a search without any fault."""
    task = _long(made, tmp_path_factory.mktemp("undisturbed"))
    for architecture in candidates:
        run_trial(task, architecture, lambda event: None)
    return _ranking(search(task, candidates))


@pytest.fixture(scope="module")
def cluster():
    """A cluster with a head that runs no trials and two nodes that run one each."""
    preemption = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
    with two_nodes(**preemption) as made:
        yield made


class _LookedEnoughError(Exception):
    pass


def _long(made, folder):
    task = search_task(made, folder, rungs=(20,))
    return replace(task, config=replace(task.config, **LONG))


def _ranking(found):
    return [replace(candidate, seconds=0) for candidate in found.ranking]


def _steps(events, architecture):
    return [event.step for a, event in events if a == architecture and isinstance(event, Progress)]


def _wait_until(condition, process=None):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None
        time.sleep(0.02)


def _saved_step(task, architecture):
    """The step of a trial's last checkpoint; 0 if there is none."""
    saved = Path(task.folder, trial_key(architecture)).glob("checkpoints/step-*/manifest.json")
    return max((int(manifest.parent.name.removeprefix("step-")) for manifest in saved), default=0)


DRIVER = """
import pickle, sys, ray
from minitron_search import search
ray.init(address=sys.argv[1], log_to_driver=False)
search(*pickle.load(open(sys.argv[2], "rb")))
"""


@pytest.mark.long
def test_a_search_resumes_after_its_driver_was_killed(cluster, undisturbed, made, candidates, tmp_path):
    task = _long(made, tmp_path / "trials")
    (tmp_path / "arguments").write_bytes(pickle.dumps((task, candidates)))
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, cluster.address, str(tmp_path / "arguments")])

    def finished():
        return [a for a in candidates if Path(task.folder, trial_key(a), "result.json").exists()]

    def begun():
        return [a for a in candidates if a not in finished() and _saved_step(task, a)]

    # a trial that cannot finish before Ray ends it
    _wait_until(lambda: finished() and any(0 < _saved_step(task, a) <= LONG["steps"] / 4 for a in begun()), driver)
    driver.kill()
    driver.wait()
    _wait_until(lambda: ray.available_resources().get("CPU") == 2)  # Ray has ended its trials
    before, going_on, events = json_files(tmp_path / "trials"), begun(), []
    done = finished()
    assert going_on, "the trials ended before the driver was killed"
    found = search(task, candidates, pool=Pool(str(tmp_path / "tune"), on_event=lambda *event: events.append(event)))
    assert _ranking(found) == undisturbed
    for architecture in done:
        assert architecture not in [reported for reported, _ in events]
        folder = trial_key(architecture)
        assert all(path.stat().st_mtime_ns == at for path, at in before.items() if path.parent.name == folder)
    for architecture in going_on:
        steps = _steps(events, architecture)
        assert steps[0] > LONG["checkpoint_every"]
        assert steps == list(range(steps[0], LONG["steps"] + 1))


def test_a_worker_that_the_memory_monitor_killed_is_reported_as_such(cluster, candidates, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_memory_usage_threshold", "0.001")  # always exceeded
        patch.setenv("RAY_memory_monitor_refresh_ms", "100")
        node = cluster.add_node(num_cpus=1, resources={"short_of_memory": 1})
    try:
        pool = Pool(str(tmp_path), share={"CPU": 1, "short_of_memory": 1}, max_failures=0)
        failures = pool.run(lambda architecture, report: time.sleep(60), candidates[:1], lambda architecture: None)
    finally:
        cluster.remove_node(node)
    assert set(failures) == {candidates[0]}
    assert failures[candidates[0]].startswith(
        "its worker was killed because the node ran out of memory; lower micro_batch_rows"
    )


def test_a_kill_for_memory_that_arrives_as_a_task_error_does_not_end_the_search(
    cluster, candidates, tmp_path, monkeypatch
):
    """Ray raises one of two errors for such a kill, whichever arrives first; here it is always the rarer one."""
    get = ray.get

    def get_as_task(*args, **options):
        try:
            return get(*args, **options)
        except RayActorError as error:
            raise OutOfMemoryError(str(error)) from error

    monkeypatch.setattr(ray, "get", get_as_task)
    killed, *others = candidates
    folder = tmp_path / "done"
    folder.mkdir()

    def work(architecture, report):
        report(Started(os.getpid()))
        if architecture == killed:
            time.sleep(60)
        (folder / trial_key(architecture)).touch()

    def on_event(architecture, event):
        if architecture == killed and isinstance(event, Started):
            os.kill(event.pid, signal.SIGKILL)

    pool = Pool(str(tmp_path / "tune"), max_failures=0, on_event=on_event)
    failures = pool.run(work, candidates, lambda architecture: (folder / trial_key(architecture)).exists())
    assert set(failures) == {killed}
    assert {path.name for path in folder.iterdir()} == {trial_key(architecture) for architecture in others}


def test_a_candidate_without_room_on_a_shared_gpu_gets_one_to_itself(cluster, candidates, tmp_path):
    small, large, largest = candidates[:3]

    def work(architecture, report):
        gpus = ray.get_runtime_context().get_assigned_resources()["GPU"]
        (tmp_path / f"{trial_key(architecture)}-{gpus}").touch()
        if architecture == largest or (architecture == large and gpus < 1):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has less.")

    def done(architecture):
        gpus = {small: 0.5, large: 1.0}.get(architecture)
        return (tmp_path / f"{trial_key(architecture)}-{gpus}").exists()

    node, events = cluster.add_node(num_cpus=2, num_gpus=1), []
    try:
        pool = Pool(
            str(tmp_path / "tune"),
            share={"CPU": 1, "GPU": 0.5},
            max_failures=1,
            on_event=lambda *event: events.append(event),
        )
        failures = pool.run(work, [small, large, largest], done)
    finally:
        cluster.remove_node(node)
    assert set(failures) == {largest}
    assert failures[largest].startswith("out of GPU memory: CUDA out of memory. Tried to allocate 2.00 GiB; lower")
    again = {architecture: event for architecture, event in events if isinstance(event, Retried)}
    assert set(again) == {large, largest}
    assert again[large].reason.endswith("; next with a whole GPU")
    assert [architecture for architecture, event in events if isinstance(event, Failed)] == [largest]


def test_a_node_that_joins_a_search_gives_it_one_more_trial_at_once(cluster, candidates, tmp_path):
    nodes = len(cluster.worker_nodes)
    added = []
    deadline = time.monotonic() + 300

    def work(architecture, report):
        (tmp_path / f"began-{trial_key(architecture)}").touch()
        while not (tmp_path / "end").exists():
            time.sleep(0.05)
        (tmp_path / f"ended-{trial_key(architecture)}").touch()

    def look():
        assert time.monotonic() < deadline
        began = len(list(tmp_path.glob("began-*")))
        if began == nodes and not added:
            added.append(cluster.add_node(num_cpus=1))
        if began > nodes:  # none has ended: the last one began because a node has joined
            (tmp_path / "end").touch()

    try:
        pool = Pool(str(tmp_path / "tune"), look=look)
        pool.run(work, candidates[: nodes + 1], lambda a: (tmp_path / f"ended-{trial_key(a)}").exists())
    finally:
        for node in added:
            cluster.remove_node(node)


def test_a_kept_worker_that_has_died_gets_no_trial(cluster, candidates, tmp_path):
    pids = {}

    def work(architecture, report):
        report(Started(os.getpid()))
        (tmp_path / trial_key(architecture)).write_text(" ".join(sys.modules))

    def on_event(architecture, event):
        if isinstance(event, Started):
            pids[architecture] = event.pid

    def run(architectures):
        return pool.run(work, architectures, lambda a: (tmp_path / trial_key(a)).exists())

    with Pool(str(tmp_path / "tune"), max_failures=0, on_event=on_event).open() as pool:
        assert run(candidates[:1]) == {}
        (died,) = pids.values()
        os.kill(died, signal.SIGKILL)
        actors = ray._private.state.actors
        _wait_until(lambda: [a["State"] for a in actors().values() if a["Pid"] == died] == ["DEAD"])
        assert run(candidates[:2]) == {}
    assert pids[candidates[1]] != died
    # work without a model does not wait for what models need
    assert not {"torch", "transformers"} & set((tmp_path / trial_key(candidates[1])).read_text().split())


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_trial_saves_its_state_at_once_when_its_node_is_about_to_be_taken_away(
    cluster, made, candidates, tmp_path, workers
):
    task = _long(made, tmp_path)
    task = replace(task, config=replace(task.config, steps=1_000_000, checkpoint_every=1_000_000))
    architecture, events = candidates[0], []

    def on_event(architecture, event):
        events.append(event)
        if isinstance(event, Started):
            leaving.append(_node_of(cluster, event.pid))
            drain(leaving[0].node_id)

    def look():
        assert time.monotonic() < deadline
        if any(isinstance(event, Leaving) for event in events):
            raise _LookedEnoughError

    while len(cluster.worker_nodes) < 2:
        cluster.add_node(num_cpus=1)
    leaving, deadline = [], time.monotonic() + 300
    pool = Pool(str(tmp_path / "tune"), workers=workers, on_event=on_event, look=look)
    try:
        with pytest.raises(_LookedEnoughError):
            search(task, [architecture], pool=pool)
    finally:
        for node in leaving:
            cluster.remove_node(node)
            cluster.add_node(num_cpus=1)
    (step,) = [event.step for event in events if isinstance(event, Leaving)]
    assert _saved_step(task, architecture) == step


def _kill_a_worker(cluster, pid):
    os.kill(pid, signal.SIGKILL)


def _node_of(cluster, pid):
    """The node on which process `pid` runs."""
    listed = subprocess.run(["ps", "-o", "ppid=", "-p", str(pid)], capture_output=True, text=True, check=True)
    raylets = {node.all_processes["raylet"][0].process.pid: node for node in cluster.worker_nodes}
    return raylets[int(listed.stdout)]


def _node_of_the_trial(cluster):
    """The node of the process that has started a trial's workers."""
    actors = ray._private.state.actors().values()
    at = [
        actor["Address"]["NodeID"]
        for actor in actors
        if actor["State"] == "ALIVE" and "ImplicitFunc" in actor["ActorClassName"]
    ]
    (node,) = [node for node in cluster.worker_nodes if node.node_id in at]
    return node


def _remove_a_node(cluster, pid):
    cluster.remove_node(_node_of(cluster, pid), allow_graceful=False)


@pytest.mark.parametrize("fault", [_kill_a_worker, pytest.param(_remove_a_node, marks=pytest.mark.long)])
def test_a_search_resumes_a_trial_after_its_worker_or_node_was_killed(
    cluster, undisturbed, made, candidates, tmp_path, fault
):
    task, events, struck, pids = _long(made, tmp_path), [], [], {}

    def on_event(architecture, event):
        events.append((architecture, event))
        if isinstance(event, Started):
            pids[architecture] = event.pid
        if not struck and isinstance(event, Progress) and event.step == KILLED_AT:
            struck.append(architecture)
            fault(cluster, pids[architecture])

    found = search(task, candidates, pool=Pool(str(tmp_path / "tune"), on_event=on_event))
    assert _ranking(found) == undisturbed
    assert not found.failures
    (retried,) = [index for index, (_, event) in enumerate(events) if isinstance(event, Retried)]
    assert [events[retried][0]] == struck
    steps = _steps(events[retried:], struck[0])
    assert steps[0] > LONG["checkpoint_every"]
    assert steps == list(range(steps[0], LONG["steps"] + 1))
    for architecture in candidates:  # the other trials were not disturbed
        if architecture not in struck:
            assert _steps(events, architecture) == list(range(1, LONG["steps"] + 1))


@pytest.mark.long
@pytest.mark.parametrize("lost", ["the trial's own process", "a worker"])
def test_a_trial_of_two_workers_resumes_after_a_node_was_lost(cluster, made, candidates, tmp_path, lost):
    """On a cluster without a dashboard, which Ray Train needs to free the resources that a lost trial had."""
    while len(cluster.worker_nodes) < 2:
        cluster.add_node(num_cpus=1)
    task, events, struck = _long(made, tmp_path), [], []
    deadline = time.monotonic() + 300

    def look():
        assert time.monotonic() < deadline
        if struck or not any(isinstance(event, Progress) and event.step >= KILLED_AT for event in events):
            return
        own = _node_of_the_trial(cluster)
        (other,) = [node for node in cluster.worker_nodes if node != own]
        struck.append(own if lost == "the trial's own process" else other)
        cluster.remove_node(struck[0], allow_graceful=False)
        cluster.add_node(num_cpus=1)

    pool = Pool(str(tmp_path / "tune"), workers=2, on_event=lambda architecture, event: events.append(event), look=look)
    task = replace(task, config=replace(task.config, steps=200))
    found = search(task, candidates[:1], pool=pool)
    assert not found.failures
    assert struck
    (retried,) = [index for index, event in enumerate(events) if isinstance(event, Retried)]
    steps = [event.step for event in events[retried:] if isinstance(event, Progress)]
    assert steps[0] > LONG["checkpoint_every"]
    assert steps == list(range(steps[0], 201))


@pytest.mark.long
def test_a_trial_goes_on_with_one_worker_while_a_node_is_missing(cluster, made, candidates, tmp_path, monkeypatch):
    monkeypatch.setattr("minitron_search.elastic.RESIZE_SECONDS", 1.0)
    while len(cluster.worker_nodes) < 2:
        cluster.add_node(num_cpus=1)
    task, events, changes = _long(made, tmp_path / "trials"), [], []
    task = replace(task, config=replace(task.config, steps=600))
    architecture, deadline = candidates[0], time.monotonic() + 500

    def starts():
        return [index for index, event in enumerate(events) if isinstance(event, Started)]

    def steps():
        return [event.step for event in events[starts()[-1] :] if isinstance(event, Progress)] if starts() else []

    def look():
        assert time.monotonic() < deadline
        if len(starts()) == 1 and not changes and len(steps()) > KILLED_AT:
            own = _node_of_the_trial(cluster)
            changes.append(next(node for node in cluster.worker_nodes if node != own))
            cluster.remove_node(changes[0], allow_graceful=False)
        if len(starts()) == 2 and len(changes) == 1 and len(steps()) > KILLED_AT:
            changes.append(cluster.add_node(num_cpus=1))

    pool = Pool(str(tmp_path / "tune"), workers=2, least=1, on_event=lambda _, event: events.append(event), look=look)
    found = search(task, [architecture], pool=pool)
    assert not found.failures
    first, alone, together = starts()
    assert [index for index, event in enumerate(events) if isinstance(event, Retried)] == [
        alone - 1
    ]  # growing is no failure
    begun = [
        next(event.step for event in events[at:] if isinstance(event, Progress)) for at in (first, alone, together)
    ]
    assert begun[0] == 1
    assert begun[1] > LONG["checkpoint_every"]
    assert begun[2] > begun[1] + KILLED_AT  # from a checkpoint of the one worker
    assert steps() == list(range(begun[2], 601))
    undisturbed = replace(task, folder=str(tmp_path / "undisturbed"))
    run_trial(undisturbed, architecture, lambda event: None)
    (alike,) = search(undisturbed, [architecture]).ranking
    assert found.ranking[0].kl == pytest.approx(alike.kl, rel=1e-4)
