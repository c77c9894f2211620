"""Checks of this machine alone, without Ray."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator

from minitron_platform.doctor import allreduce
from minitron_platform.doctor.finding import Finding
from minitron_platform.doctor.node import NodeFacts, node_facts
from minitron_platform.doctor.node_checks import node_findings

CPU_PROCESSES = 2


def findings_here(storage_root: str) -> Iterator[Finding]:
    """The findings about this machine. storage_root: where runs keep their files."""
    facts = node_facts(storage_root, "")
    yield from node_findings([facts])
    yield _all_reduce(facts)


def _all_reduce(facts: NodeFacts) -> Finding:
    count = facts.torch_gpus or CPU_PROCESSES
    if count == 1:
        return Finding("all-reduce", facts.node, "skipped", "one GPU")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", allreduce.__name__, str(rank), str(count), address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    outputs = []
    try:
        outputs = [process.communicate(timeout=allreduce.TIMEOUT_SECONDS * 2) for process in processes]
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return allreduce.finding(
        facts.node, count, facts.torch_gpus > 0, [out for out, _ in outputs], [err for _, err in outputs]
    )
