"""The function that Ray Train runs in every process of a group of workers: it takes one call after another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ray
import torch
import torch.distributed as dist

from minitron.log_records import make_records_safe
from minitron.processes import wait_for_all
from minitron_platform.workers.calls import Call, node_name, packed_actor, sender
from minitron_platform.workers.worker import SentProgress, Worker, WorkerStarted
from minitron_search.leaving import group_is_leaving
from minitron_search.memory import release_memory


def serve(config: dict[str, Any]) -> None:
    """Run the calls of `config["calls"]` until there are none."""
    make_records_safe()
    calls = config["calls"]
    rank, count = dist.get_rank(), dist.get_world_size()
    if not torch.cuda.is_available():
        torch.set_num_threads(config["threads"])
    if rank == 0:
        ray.get(calls.begin.remote(count))
    wait_for_all()  # so that no process joins or answers before the actor knows of the new group
    ray.get(calls.join.remote(WorkerStarted(rank, node_name()), packed_actor()))
    send = sender(calls, rank)
    number = 0
    while (call := ray.get(calls.next.remote(number))) is not None:
        number = call.number
        processes = count if call.everywhere else 1
        worker = Worker(
            rank,
            processes,
            SentProgress(send, processes),
            send,
            resumable=calls.resumable.remote,
            is_leaving=group_is_leaving,
        )
        result = _run(call, worker)
        release_memory()
        ray.get(calls.answer.remote(number, rank, [result]))


def _run(call: Call, worker: Worker) -> Any:
    """What this process returns from a call. The function and its task are local, so that their memory is freed."""
    if not (call.everywhere or worker.is_first):
        return None
    function, task, before_commit = ray.get(call.content[0])
    result = function(task, replace(worker, before_commit=before_commit))
    return result if worker.is_first else None
