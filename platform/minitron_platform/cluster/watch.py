"""Watches the cluster while a run waits for its workers: what is still missing, and nodes that leave and come."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape

from minitron.errors import MinitronError
from minitron_platform.console import Console, seconds
from minitron_search.nodes import Node
from minitron_search.placement import max_concurrent_trials

LOOK_SECONDS = 2.0  # between two looks at the cluster
PATIENCE = 4.0  # seconds that a request may take without being mentioned


@dataclass(frozen=True)
class Request:
    """Resources that workers or trials of this run have requested and do not have yet."""

    bundles: Sequence[Node]
    """What each process has requested."""
    free: Sequence[Node]
    """What each node of the cluster has free."""

    def __str__(self) -> str:
        """For example "2 of 8 GPUs"."""
        unit = next((unit for unit in ("GPU", "CPU") if any(unit in bundle for bundle in self.bundles)), "")
        if not unit:
            return f"{len(self.bundles)} processes"
        needed = sum(bundle.get(unit, 0) for bundle in self.bundles)
        share = self.bundles[0]
        fitting = min(max_concurrent_trials(self.free, share), len(self.bundles))
        missing = needed - fitting * share.get(unit, 0)
        # equal to `needed` too if all are free, but not together where they are needed
        amount = f"{missing:g} of {needed:g}" if 0 < missing < needed else f"{needed:g}"
        return f"{amount} {unit}{'s' if needed > 1 else ''}"


class ClusterWatch:
    """Shows in `console` what the run waits for, and says which nodes were lost or have joined.

    timeout: longest wait for requested resources in seconds; None for any.
    """

    def __init__(self, console: Console, timeout: float | None = None) -> None:
        self.console = console
        self.timeout = timeout
        self._last_look = 0.0
        self._nodes: dict[str, dict[str, Any]] | None = None
        self._request: Request | None = None
        self._since = 0.0  # when the request was first seen
        self._looks_without = 0  # since the request was last seen

    def look(self, tasks: Sequence[Node] = (), /) -> None:
        """Look at the cluster, unless that was done a moment ago. tasks: what tasks of Ray have requested without having begun.

        Raises MinitronError if the run has waited longer than the timeout.
        """
        import ray

        now = time.monotonic()
        if now - self._last_look < LOOK_SECONDS or not ray.is_initialized():
            return
        self._last_look = now
        self._look_at_nodes()
        bundles = [*_requested(), *tasks]
        self._looks_without = 0 if bundles else self._looks_without + 1
        if not bundles:
            if self._looks_without > 1:  # a group that waits gives its request up now and then, and makes another
                self.end()
            return
        if self._request is None:
            self._since = now
        self._request = Request(bundles, list(ray._private.state.available_resources_per_node().values()))
        if now - self._since > PATIENCE:
            self.console.note(self._text)
        if self.timeout is not None and now - self._since > self.timeout:
            what = str(self._request)
            raise MinitronError(
                f"the cluster has not given {what} within {seconds(self.timeout)}, which resources.wait_timeout allows",
                "run again when it has room, or lower the numbers in resources; what is finished is kept",
            )

    def end(self) -> None:
        """The run does not wait any more."""
        self._request = None
        self.console.note(None)

    def _text(self) -> str:
        """For example "waiting for 2 of 8 GPUs, requested 12 s ago"."""
        if self._request is None:
            return ""
        return f"waiting for {self._request}, requested {seconds(time.monotonic() - self._since)} ago"

    def _look_at_nodes(self) -> None:
        import ray

        nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        if self._nodes is not None:
            lost = [node for key, node in self._nodes.items() if key not in nodes]
            joined = [node for key, node in nodes.items() if key not in self._nodes]
            if lost:
                what = "its processes start again on other nodes, as soon as there is room, from their last checkpoint"
                self.console.say(f"  [yellow]lost[/]    {escape(_names(lost))}; {what}")
            if joined:
                self.console.say(f"  [green]joined[/]  {escape(_names(joined))}")
        self._nodes = nodes


def _requested() -> list[Node]:
    """What every process requests in the placement groups of this program that do not have their resources yet."""
    from minitron_search.placement_groups import waiting_groups

    # of a group whose node was lost, only the lost bundles wait
    return [
        dict(bundle.unit_resources)
        for group in waiting_groups()
        for bundle in group.bundles
        if not bundle.node_id.strip(b"\xff")
    ]


def _names(nodes: list[dict[str, Any]]) -> str:
    """For example "node 10.0.0.2 (8 GPUs)"."""
    parts = []
    for node in nodes:
        unit = next((unit for unit in ("GPU", "CPU") if node["Resources"].get(unit)), None)
        amount = f" ({node['Resources'][unit]:g} {unit}s)" if unit else ""
        parts.append(f"{node['NodeManagerHostname']} {node['NodeManagerAddress']}{amount}")
    return f"node{'s' if len(parts) > 1 else ''} {', '.join(parts)}"
