"""All checks, of this machine or of a cluster."""

from __future__ import annotations

from collections.abc import Iterator

from minitron_platform.cluster.room import joins_cluster
from minitron_platform.doctor.finding import Finding
from minitron_platform.doctor.services import service_findings
from minitron_platform.locations import Locations


def findings(locations: Locations, address: str | None = None) -> Iterator[Finding]:
    """Check what runs with this storage and this MLflow need, on the Ray cluster at `address` or on this machine.

    Raises MinitronError if the cluster does not answer.
    """
    if joins_cluster(address):
        from minitron_platform.doctor.cluster import findings_of_cluster

        yield from findings_of_cluster(address, locations.storage)
    else:
        from minitron_platform.doctor.here import findings_here

        yield from findings_here(locations.storage)
    yield from service_findings(locations.tracking_uri)
