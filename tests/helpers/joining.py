"""Two processes that join a group as Ray Train's workers do, and report what they listen on."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch
import torch.distributed as dist

from minitron.collectives import gather_json, gather_results
from minitron.errors import InputError
from minitron_search.process_group import join, listen


def _refuse_second() -> int:
    if dist.get_rank() == 1:
        raise InputError("a key", "a remedy")
    return dist.get_rank()


def _process(rank: int, addresses: list[str], pipe: Connection) -> None:
    for address in addresses:
        if rank == 0:
            pipe.send(listen(address))
        port = pipe.recv()
        join("gloo", rank, 2, (address, port), 60)
        total = torch.tensor([float(rank + 1)])
        dist.all_reduce(total)
        own = {"rank": rank, "third": rank / 3, "nothing": float("inf"), "text": "ä" * (1 + 99 * rank)}
        gathered = gather_json(own)
        error: Any = None
        try:
            gather_results(_refuse_second, dist.group.WORLD)
        except InputError as raised:
            error = [raised.problem, raised.remedy]
        connections = psutil.Process().net_connections("tcp")
        listening = sorted({each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN})
        pipe.send({"listening": listening, "gathered": gathered, "error": error, "total": float(total)})
        dist.destroy_process_group()


def join_two(addresses: list[str]) -> list[list[dict[str, Any]]]:
    """What each of two processes reports for each of the addresses that their store listens at."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(2):
        here, there = context.Pipe()
        process = context.Process(target=_process, args=(rank, addresses, there))
        process.start()
        pipes.append(here)
        processes.append(process)
    reports = []
    for _ in addresses:
        port = pipes[0].recv()
        for pipe in pipes:
            pipe.send(port)
        reports.append([pipe.recv() for pipe in pipes])
    for process in processes:
        process.join(60)
    return reports
