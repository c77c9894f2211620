"""Placement groups of this program that do not have their resources yet."""

from __future__ import annotations

from typing import Any

import ray
from ray._raylet import PlacementGroupID
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.util.placement_group import PlacementGroup, remove_placement_group

WAITING = (PlacementGroupTableData.PENDING, PlacementGroupTableData.RESCHEDULING)


def waiting_groups() -> list[PlacementGroupTableData]:
    """Ray's descriptions of the groups that wait."""
    job = ray.get_runtime_context().get_job_id()
    table = ray._private.state.state._connect_and_get_accessor().get_placement_group_table()
    groups = map(PlacementGroupTableData.FromString, table)
    return [group for group in groups if group.creator_job_id.hex() == job and group.state in WAITING]


def withdraw_requests(actor: Any) -> None:
    """Remove the waiting groups of an actor. Ray keeps those of an actor that was killed until the program ends, and gives them
    resources as soon as there are some."""
    for group in waiting_groups():
        if group.creator_actor_id == actor._actor_id.binary():
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
