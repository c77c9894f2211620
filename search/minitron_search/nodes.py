"""The nodes of a Ray cluster, and those that its autoscaler may add."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

Node = dict[str, float]  # the resources of a node, by Ray's names
GROUP_LABEL = "ray.io/node-group"  # ray._raylet.RAY_NODE_GROUP_KEY
MOST_ADDED = 1000  # nodes of a kind, if the autoscaler has no limit
ANY_MEMORY = 1e15  # bytes, of a node whose memory is known once it has started


def gpus_of(nodes: Iterable[Mapping[str, float]]) -> int:
    """Number of GPUs of `nodes`."""
    return sum(int(node.get("GPU", 0)) for node in nodes)


def present_nodes(state: Any = None) -> list[Node]:
    """Resources of the nodes that are alive. state: of the cluster, by default of the connected one."""
    return [node["Resources"] for node in _alive(_state(state))]


def possible_nodes(state: Any = None) -> list[Node]:
    """Resources of the nodes that are alive and of those that the cluster's autoscaler may start. state: as above."""
    state = _state(state)
    alive = _alive(state)
    config = state.get_cluster_config()
    groups = config.node_group_configs if config else ()
    names = {group.name for group in groups}
    named, unnamed = Counter[str](), Counter[tuple[float, ...]]()
    for node in alive:
        name = (node.get("Labels") or {}).get(GROUP_LABEL, "")
        if name in names:
            named[name] += 1
        else:
            unnamed[_shape(node["Resources"])] += 1
    added: list[Node] = []
    for group in groups:
        resources = {"memory": ANY_MEMORY, **{name: float(amount) for name, amount in group.resources.items()}}
        left = max(0, (MOST_ADDED if group.max_count < 0 else group.max_count) - named[group.name])
        # of groups of one shape, those that come first have the nodes that do not say which group they are of
        running = min(left, unnamed[_shape(resources)])
        unnamed[_shape(resources)] -= running
        added += [resources] * min(left - running, MOST_ADDED)
    return [*(node["Resources"] for node in alive), *added]


def main_memory(node: Node) -> int:
    """Bytes of main memory that a node had free for Ray when it started; ANY_MEMORY or more if that is not known."""
    return int(node.get("memory", ANY_MEMORY) + node.get("object_store_memory", 0))


def _state(state: Any) -> Any:
    if state is not None:
        return state
    import ray

    return ray._private.state.state


def _alive(state: Any) -> list[dict[str, Any]]:
    return [node for node in state.node_table() if node["Alive"]]


def _shape(resources: Node) -> tuple[float, ...]:
    """CPUs and GPUs, by which nodes that do not say which group they are of are counted."""
    return tuple(resources.get(name, 0.0) for name in ("CPU", "GPU"))
