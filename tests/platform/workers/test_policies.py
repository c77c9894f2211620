"""When a group of workers is restarted with another number of them."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import _AutoscalingCoordinatorActor
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import NoopDecision

from minitron_platform.workers.calls import _Calls
from minitron_search import elastic
from minitron_search.elastic import ElasticPolicy


class Group:
    """A group of one worker whose call is in progress, its controller's policy, and the CPUs of the cluster's nodes."""

    def __init__(self, monkeypatch):
        self.cpus = [1]
        self.calls = _Calls(1)
        asyncio.run(self.calls.start([], True))
        actor = SimpleNamespace(
            may_resize=SimpleNamespace(remote=lambda *given: asyncio.run(self.calls.may_resize(*given)))
        )
        monkeypatch.setattr(elastic.ray, "get", lambda value, timeout=None: value)
        monkeypatch.setattr(ElasticPolicy, "_maybe_send_resource_request", lambda policy: None)
        coordinator = _AutoscalingCoordinatorActor(
            send_resources_request=lambda bundles: None, get_cluster_nodes=self.nodes
        )
        coordinator.request_resources("group", [{"CPU": 1}] * 2, expire_after_s=1000)
        ask = SimpleNamespace(get_reserved_resources=SimpleNamespace(remote=coordinator.get_reserved_resources))
        monkeypatch.setattr(ElasticPolicy, "_autoscaling_coordinator", ask)
        self.scaling = ScalingConfig(
            num_workers=(1, 2), resources_per_worker={"CPU": 1}, elastic_resize_monitor_interval_s=1e-9
        )
        self.policy = ElasticPolicy(self.scaling, actor)
        self.policy._requester_id = "group"

    def nodes(self):
        """Ray's description of the nodes."""
        return [{"Alive": True, "NodeID": str(n), "Resources": {"CPU": cpus}} for n, cpus in enumerate(self.cpus)]

    def checkpoint(self):
        asyncio.run(self.calls.resumable())

    def decide(self):
        """The number of workers to restart with; None to go on."""
        state = SimpleNamespace(start_time=0.0, num_workers=1)
        decision = self.policy.make_decision_for_running_worker_group(
            worker_group_state=state, worker_group_status=None
        )
        return None if isinstance(decision, NoopDecision) else decision.num_workers


@pytest.fixture
def group(monkeypatch):
    return Group(monkeypatch)


def test_a_group_grows_at_the_first_checkpoint_after_there_is_room(group):
    group.checkpoint()  # steps since then would be lost
    group.cpus = [1, 1]
    assert [group.decide(), group.decide()] == [None, None]
    group.checkpoint()
    assert group.decide() == 2


def test_room_that_is_gone_again_before_the_checkpoint_is_not_waited_for(group):
    group.cpus = [1, 1]
    assert group.decide() is None
    group.cpus = [1]
    assert group.decide() is None
    group.checkpoint()
    assert group.decide() is None
    group.cpus = [1, 1]
    assert group.decide() is None
    group.checkpoint()
    group.policy.make_decision_for_non_running_worker_group()  # a worker has died
    assert group.decide() is None


def test_a_group_does_not_wait_for_a_worker_on_a_node_that_is_lost(group):
    group.cpus = [1, 1]
    assert group.policy.make_decision_for_non_running_worker_group().num_workers == 2
    group.cpus = [1]
    assert group.policy.make_decision_for_non_running_worker_group().num_workers == 1
    group.cpus = []
    decision = group.policy.make_decision_for_non_running_worker_group()
    assert decision.num_workers == 1  # it is requested, and the run says that it waits for it
