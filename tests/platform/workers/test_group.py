"""The end of a group of workers, without a cluster; its work is in tests/clusters/test_workers.py."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import ray

from minitron_platform.cluster.ray_session import ray_session
from minitron_platform.workers import group as group_module
from minitron_platform.workers.group import WorkerGroup


def test_a_group_that_ends_after_ray_does_not_start_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a busy machine Ray Train may take longer to end than the driver waits for it."""
    may_end = threading.Event()
    monkeypatch.setattr(group_module.TorchTrainer, "fit", lambda _: may_end.wait())
    with ray_session("local", num_cpus=1):
        group = WorkerGroup(1, {"CPU": 1.0}, threads=1, max_failures=0, scratch=str(tmp_path / "scratch"))
    may_end.set()
    group._thread.shutdown()
    assert not group.is_open
    assert not ray.is_initialized()
    assert caplog.messages == []  # Ray may also fail to start, since the settings of the session are no longer there
