"""How fast models generate text: several models in turns, each by an engine, over lengths of prompts and answers."""

from __future__ import annotations

from minitron.throughput.engine import Engine, Request, Workload
from minitron.throughput.in_memory import InMemoryEngine
from minitron.throughput.measure import Spread, Throughput, measure
from minitron.throughput.server import ServerEngine
from minitron.throughput.vllm import vllm_server

__all__ = [
    "Engine",
    "InMemoryEngine",
    "Request",
    "ServerEngine",
    "Spread",
    "Throughput",
    "Workload",
    "measure",
    "vllm_server",
]
