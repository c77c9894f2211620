"""Prints the environment of the Python that runs this file, as one line of JSON, and in a job the cluster's nodes.

The file is also sent to a cluster with `minitron_search/nodes.py` alone, as a job, before the packages that it looks for are
there: it needs nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import platform
from importlib.metadata import distributions

MARK = "MINITRON_ENVIRONMENT "  # begins the line in the job's log


def environment() -> dict[str, object]:
    """Python's version and that of every installed package, by its normalised name."""
    packages = {each.name.lower().replace("_", "-"): each.version for each in distributions() if each.name}
    return {"python": platform.python_version(), "packages": packages}


def nodes() -> list[dict[str, float]] | None:
    """The resources of the cluster's nodes, and of those that it may start; None outside a job."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        return None
    import ray
    from nodes import possible_nodes  # type: ignore[import-not-found]  # the file beside this one

    ray.init(logging_level=logging.ERROR, log_to_driver=False)
    found: list[dict[str, float]] = possible_nodes()
    return found


if __name__ == "__main__":
    print(MARK + json.dumps({**environment(), "nodes": nodes()}))
