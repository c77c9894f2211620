"""Placement groups of this program that wait for resources, or hold them for an actor that is gone.

Ray keeps the groups that an actor has created until the whole program ends, even if the actor was killed or its node is lost.
"""

from __future__ import annotations

from typing import Any

import ray
from ray._raylet import ActorID, PlacementGroupID
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.util.placement_group import PlacementGroup, remove_placement_group

WAITING = (PlacementGroupTableData.PENDING, PlacementGroupTableData.RESCHEDULING)


def waiting_groups() -> list[PlacementGroupTableData]:
    """Ray's descriptions of the groups that wait."""
    return [group for group in _groups() if group.state in WAITING]


def withdraw_requests(actor: Any) -> None:
    """Remove the waiting groups of an actor that was killed; Ray would give them resources as soon as there are some."""
    for group in waiting_groups():
        if group.creator_actor_id == actor._actor_id.binary():
            _remove(group)


def remove_orphaned_groups() -> None:
    """Remove the groups of actors that have died. Ray Train has a cleaner for those of its controller, which needs Ray's
    dashboard, and a cluster may have none."""
    for group in _groups():
        if group.state != PlacementGroupTableData.REMOVED and is_dead(group.creator_actor_id):
            _remove(group)


def _groups() -> list[PlacementGroupTableData]:
    job = ray.get_runtime_context().get_job_id()
    table = ray._private.state.state._connect_and_get_accessor().get_placement_group_table()
    groups = map(PlacementGroupTableData.FromString, table)
    return [group for group in groups if group.creator_job_id.hex() == job]


def is_dead(actor: bytes) -> bool:
    """Whether Ray knows that the actor of this id has died; false for what the driver has created, which has no actor."""
    if not actor or ActorID(actor).is_nil():
        return False
    return bool(ray._private.state.actors(actor.hex()).get("State") == "DEAD")


def _remove(group: PlacementGroupTableData) -> None:
    remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
