"""Shared by the tests of distillation."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from minitron.distill import sharding


@pytest.fixture
def processes(monkeypatch):
    """A function that makes this process the first of `world`, which send nothing, on nodes of `node` each with GPUs of 80 GB,
    or on nodes of which nothing is known. What it gathers are copies of its own part."""

    def begin(world, node=0):
        if node:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(node))
            monkeypatch.setenv("LOCAL_RANK", "0")
            monkeypatch.setattr(sharding, "_gpu_bytes", lambda device: 80_000_000_000)
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())

    yield begin
    if dist.is_initialized():
        dist.destroy_process_group()
