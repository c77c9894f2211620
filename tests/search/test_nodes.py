"""The nodes that a cluster has, and those that its autoscaler may start, as it tells Ray."""

from __future__ import annotations

from types import SimpleNamespace

from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig

from minitron_search.nodes import MOST_ADDED, possible_nodes, present_nodes
from minitron_search.placement import max_concurrent_trials


def _cluster(alive, *groups):
    """The state of a cluster: alive has the resources and group of each node, groups are (name, resources, most)."""
    nodes = [{"Alive": True, "Resources": each, "Labels": {"ray.io/node-group": name}} for each, name in alive]
    nodes.append({"Alive": False, "Resources": {"CPU": 64.0}, "Labels": {}})
    configs = [NodeGroupConfig(name=name, resources=each, max_count=most) for name, each, most in groups]
    config = ClusterConfig(node_group_configs=configs) if groups else None
    return SimpleNamespace(node_table=lambda: nodes, get_cluster_config=lambda: config)


def _gpus(nodes):
    return [node.get("GPU", 0) for node in nodes]


def test_gpu_workers_at_zero_count_if_the_autoscaler_may_start_them():
    head = ({"CPU": 2.0}, "head")
    state = _cluster([head], ("head", {"CPU": 2}, 1), ("gpu", {"CPU": 64, "GPU": 8}, 4))
    assert _gpus(present_nodes(state)) == [0]
    assert _gpus(possible_nodes(state)) == [0, 8, 8, 8, 8]
    assert max_concurrent_trials(possible_nodes(state), {"CPU": 1, "GPU": 1, "memory": 2e9}, 32) == 1
    # a node of the group that runs is not counted twice, whether it says its group or not
    for name in ("gpu", ""):
        running = _cluster(
            [head, ({"CPU": 64.0, "GPU": 8.0}, name)], ("head", {"CPU": 2}, 1), ("gpu", {"CPU": 64, "GPU": 8}, 4)
        )
        assert _gpus(possible_nodes(running)) == [0, 8, 8, 8, 8]


def test_a_cluster_without_autoscaler_has_the_nodes_that_are_there():
    state = _cluster([({"CPU": 2.0}, "")])
    assert possible_nodes(state) == present_nodes(state) == [{"CPU": 2.0}]


def test_a_group_without_a_limit_is_large():
    assert len(possible_nodes(_cluster([], ("gpu", {"GPU": 8}, -1)))) == MOST_ADDED


def test_a_node_that_runs_takes_the_place_of_one_that_may_be_started_of_all_groups_of_its_shape():
    node = {"CPU": 64.0, "GPU": 8.0}
    groups = [(name, {"CPU": 64, "GPU": 8}, most) for name, most in (("spot", 2), ("reserved", 3))]
    for names in (
        ["", "", ""],
        ["spot", "spot", ""],
        ["spot", "spot"],
        ["reserved"],
        ["reserved", "", ""],
        ["of another"],
    ):
        assert _gpus(possible_nodes(_cluster([(node, name) for name in names], *groups))) == [8] * 5
