"""A cluster of Ray on this machine: a head that computes nothing, and two nodes with one CPU each."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.cluster_utils import Cluster

from minitron_platform.cluster import ray_session as local_ray
from minitron_search import private_ray
from minitron_search.shutdown import shutdown_ray


@contextmanager
def two_nodes(**settings: str) -> Iterator[Cluster]:
    """Start the cluster and connect to it. settings: further environment variables for its processes."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="mt-", dir="/tmp") as folder:
        # the token of this process's private Rays, because Ray keeps the first token that it reads
        for name, value in {**local_ray._private_settings(), "RAY_TMPDIR": folder, **settings}.items():
            patch.setenv(name, value)
        patch.delenv(private_ray._MARK)  # it is a cluster
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        head = {"num_cpus": 0, "memory": 0, "include_dashboard": False}
        quick = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000}
        made = Cluster()
        try:
            made.add_node(**head, _system_config=quick)
            for _ in range(2):
                made.add_node(num_cpus=1)
            ray.init(address=made.address, log_to_driver=False)
            yield made
        finally:
            shutdown_ray()
            made.shutdown()


def drain(node):
    """Announce that a node will be taken away in a minute, as a cloud does."""
    from ray._private.worker import global_worker
    from ray.core.generated import autoscaler_pb2

    deadline = int((time.time() + 60) * 1000)
    accepted, why = global_worker.gcs_client.drain_node(
        node, autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "spot", deadline
    )
    assert accepted, why
