"""The workers of a command that has no recipe: processes of this machine, or of a cluster."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from minitron import storage
from minitron.device import cores
from minitron.errors import InputError
from minitron_platform.addresses import check_ray_address
from minitron_platform.amounts import counted
from minitron_platform.cluster.head_watch import HeadWatch
from minitron_platform.cluster.room import cluster_nodes, joins_cluster
from minitron_platform.cluster.watch import ClusterWatch
from minitron_platform.console import Console
from minitron_platform.recipes.resources import ResolvedResources
from minitron_platform.workers.workers import Workers
from minitron_search.nodes import Node, gpus_of
from minitron_search.placement import max_concurrent_trials

MAX_FAILURES = 3


@contextmanager
def own_workers(console: Console, storage_root: str, *, address: str | None, count: int | None) -> Iterator[Workers]:
    """Workers with a CPU each, and a GPU where there are GPUs; they start at their first use.

    storage_root: folder that all nodes share. address: of a Ray cluster; None for this machine. count: number of workers; None
    for one per GPU, or one without GPUs. A single one on this machine is this process. Using them raises InputError if there
    is not enough room.
    """
    joins = joins_cluster(address)
    gpus_here = torch.cuda.device_count()
    count_here = count or max(1, gpus_here)
    with ExitStack() as stack:
        head = stack.enter_context(HeadWatch(console, lambda: None))

        def start() -> ResolvedResources:
            from minitron_platform.cluster.ray_session import head_address, ray_session

            if joins:
                console.status("joining the cluster")
                stack.enter_context(ray_session(address))
                head.start(head_address(address))
            else:
                console.status("starting Ray")
                cpus = max(cores(), count_here)
                stack.enter_context(ray_session("local", num_cpus=cpus, num_gpus=gpus_here, seats=count_here))
            return _room(count, cluster_nodes())

        workers = Workers(
            console,
            start_ray=start,
            computes_here=lambda: not joins and count_here == 1,
            scratch=storage.join(storage_root, f"workers-{uuid.uuid4().hex[:8]}"),
            look=ClusterWatch(console).look,
        )
        try:
            yield workers
        finally:
            workers.close()  # before Ray ends


def check_workers(address: str | None, count: int | None) -> None:
    """Raise InputError or MinitronError if `own_workers` could not start: a cluster that does not answer, or has not enough
    room. Nothing is started and no cluster joined; one whose nodes cannot be seen from outside is checked once it is joined."""
    given = address or os.environ.get("RAY_ADDRESS")
    check_ray_address(given)
    if not joins_cluster(address):
        gpus = torch.cuda.device_count()
        _room(count, [{"CPU": max(cores(), count or 1), "GPU": gpus}])
        return
    from minitron_platform.cluster.nodes_at import check_answers, nodes_at  # imports Ray

    assert given is not None
    check_answers(given)
    if there := nodes_at(given):
        _room(count, there.possible)


def _room(count: int | None, nodes: Sequence[Node]) -> ResolvedResources:
    """The resources of the workers on these nodes. Raises InputError if there is too little room."""
    gpus = gpus_of(nodes)
    count = count or max(1, gpus)
    resources = ResolvedResources(
        workers_per_trial=1,
        cpus_per_trial=1,
        gpus_per_trial=0,
        workers=count,
        cpus_per_worker=1,
        gpus_per_worker=1 if gpus else 0,
        max_failures=MAX_FAILURES,
    )
    if not max_concurrent_trials(nodes, resources.worker_share, count):
        unit = "GPU" if gpus else "CPU"
        offered = sum(int(node.get(unit, 0)) for node in nodes)
        raise InputError(
            f"--workers: {count} need {counted(count, unit)} together, and there are {offered}",
            "give fewer, or use a larger cluster",
        )
    return resources
