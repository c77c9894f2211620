"""Prints the environment of the Python that runs this file, as one line of JSON.

The file is also sent to a cluster alone, as a job, before the packages that it looks for are there: it needs nothing else.
"""

from __future__ import annotations

import json
import platform
from importlib.metadata import distributions

MARK = "MINITRON_ENVIRONMENT "  # begins the line in the job's log


def environment() -> dict[str, object]:
    """Python's version and that of every installed package, by its normalised name."""
    packages = {each.name.lower().replace("_", "-"): each.version for each in distributions() if each.name}
    return {"python": platform.python_version(), "packages": packages}


if __name__ == "__main__":
    print(MARK + json.dumps(environment()))
