"""Reads metrics back from the records of a run."""

from __future__ import annotations

from collections.abc import Collection

from minitron_platform.tracking.events import read_lines
from minitron_platform.tracking.parts import in_order, part_sizes, read_part


def recorded_metrics(folder: str, key: str, of: str, names: Collection[str]) -> dict[str, dict[int, float]]:
    """Metrics of the run `key` in the spool `folder`, by name and step; of a step that was repeated, the first.

    of: fingerprint of the work that they belong to. Raises StorageError if the spool cannot be read.
    """
    found: dict[str, dict[int, float]] = {name: {} for name in names}
    parts = {name: read_part(folder, name) for name in part_sizes(folder)}
    for portion in in_order(parts):
        for event, _ in read_lines(parts[portion.name][portion.start : portion.end]):
            if event is None or event["event"] != "metrics" or event["key"] != key or event.get("of") != of:
                continue
            for name in found.keys() & event["values"].keys():
                found[name].setdefault(int(event["step"]), float(event["values"][name]))
    return found
