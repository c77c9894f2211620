"""Checks of a Ray cluster: an actor on every node says what there is, and all of them measure an all-reduce."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from minitron import storage
from minitron.errors import MinitronError, one_line
from minitron_platform.cluster.ray_session import SEES_NO_GPU, ray_session
from minitron_platform.doctor import allreduce
from minitron_platform.doctor.finding import Finding
from minitron_platform.doctor.node import NodeFacts, node_facts
from minitron_platform.doctor.node_checks import node_findings

ANSWER_SECONDS = 90.0
SKEW_SECONDS = (1.0, 30.0)  # a warning, and a failure
Actors = dict[str, Any]  # by node id


class _Probe:
    """The actor."""

    def facts(self, storage_root: str, mark: str) -> NodeFacts:
        return node_facts(storage_root, mark)

    def now(self) -> float:
        return time.time()

    def free_address(self) -> str:
        with socket.create_server(("", 0)) as server:
            return f"tcp://{ray.util.get_node_ip_address()}:{server.getsockname()[1]}"

    def all_reduce(self, rank: int, world_size: int, address: str) -> float:
        return allreduce.all_reduce_bandwidth(rank, world_size, address)


def findings_of_cluster(address: str | None, storage_root: str) -> Iterator[Finding]:
    """The findings about the nodes of the cluster at `address`. storage_root: where runs keep their files."""
    with ray_session(address):
        nodes = [node for node in ray.nodes() if node["Alive"]]
        actors = {
            node["NodeID"]: probe(node["NodeID"], sees_gpus=node["Resources"].get("GPU", 0) > 0) for node in nodes
        }
        names = {node["NodeID"]: node["NodeManagerHostname"] for node in nodes}
        mark, storage_problem = _mark(storage_root)
        if storage_problem is not None:
            yield storage_problem
        facts: dict[str, NodeFacts] = {}
        for node, answer in _answers({node: actor.facts.remote(storage_root, mark) for node, actor in actors.items()}):
            if isinstance(answer, NodeFacts):
                facts[node] = answer
            else:
                yield Finding("node", names[node], "failed", str(answer), "look at its logs in Ray's dashboard")
        if mark:
            storage.remove(mark)
        yield from node_findings(list(facts.values()))
        for node in facts:
            yield _clock(names[node], actors[node])
        yield _all_reduce(nodes, actors, list(facts.values()))


def probe(node: str, num_gpus: int = 0, *, sees_gpus: bool = False) -> Any:
    """An actor on this node that says what it has. sees_gpus: it sees all GPUs that Ray has there, as otherwise only processes
    with GPUs of their own do."""
    here = NodeAffinitySchedulingStrategy(node, soft=False)
    environment = {"env_vars": {SEES_NO_GPU: "0"}} if sees_gpus else None
    actor = ray.remote(num_cpus=0, num_gpus=num_gpus)(_Probe)
    return actor.options(scheduling_strategy=here, runtime_env=environment).remote()


def _mark(storage_root: str) -> tuple[str, Finding | None]:
    """A new file in the storage, which all nodes must see; or why it cannot be written."""
    mark = storage.join(storage_root, f".doctor-{uuid4().hex}")
    try:
        storage.write_bytes(mark, b"")
    except (MinitronError, OSError) as error:
        problem, _, remedy = one_line(error).partition("; ")
        return "", Finding("storage", "this machine", "failed", problem, remedy)
    return mark, None


def _answers(tasks: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each node with its answer, or with a text that says why there is none."""
    ready, _ = ray.wait(list(tasks.values()), num_returns=len(tasks), timeout=ANSWER_SECONDS)
    for node, task in tasks.items():
        if task not in ready:
            yield node, f"no answer within {ANSWER_SECONDS:g} s"
            continue
        try:
            yield node, ray.get(task)
        except RayError as error:
            yield node, str(error).strip().splitlines()[-1]


def _clock(name: str, actor: Any) -> Finding:
    before = time.time()
    there = ray.get(actor.now.remote())
    after = time.time()
    skew = max(0.0, abs(there - (before + after) / 2) - (after - before) / 2)  # the answer came at any time in between
    state = "ok" if skew < SKEW_SECONDS[0] else "warning" if skew < SKEW_SECONDS[1] else "failed"
    remedy = "" if state == "ok" else "synchronise the clocks (chrony, systemd-timesyncd)"
    return Finding("clock", name, state, f"{skew:.1f} s from this machine's", remedy)  # type: ignore[arg-type]


def _all_reduce(nodes: Sequence[dict[str, Any]], actors: Actors, facts: Sequence[NodeFacts]) -> Finding:
    gpus = {node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in nodes if node["NodeID"] in actors}
    on_gpus = any(gpus.values())
    if on_gpus:
        group = [probe(node, num_gpus=1) for node, count in gpus.items() for _ in range(count)]
    else:
        group = [actors[node["NodeID"]] for node in nodes if node["Resources"].get("CPU")]
        if len(group) == 1:
            group += [probe(next(node["NodeID"] for node in nodes if node["Resources"].get("CPU")))]
    if len(group) < 2:
        return Finding("all-reduce", "all nodes", "skipped", f"{len(group)} GPU")
    first = group[0].free_address.remote()
    if not ray.wait([first], timeout=ANSWER_SECONDS)[0]:
        return Finding("all-reduce", "all nodes", "skipped", "others use the GPUs", "try again when they are free")
    address = ray.get(first)
    tasks = {str(rank): actor.all_reduce.remote(rank, len(group), address) for rank, actor in enumerate(group)}
    answers = [answer for _, answer in _answers(tasks)]
    measured = [str(answer) for answer in answers if isinstance(answer, float)]
    return allreduce.finding(
        "all nodes", len(group), on_gpus, measured, [str(a) for a in answers if isinstance(a, str)]
    )
