"""The end of this process's connection to Ray."""

from __future__ import annotations

import gc
import time

import ray


def shutdown_ray() -> None:
    """`ray.shutdown()`, with no garbage left for its time.

    If another thread frees an ObjectRef while the core worker is shut down, Ray ends the whole process with exit code 1 and no
    exception. Tune's trials and futures with an exception are reference cycles, so that the collector frees such ObjectRefs, in
    whichever thread it runs.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        _collect()
        ray.shutdown()
    finally:
        if enabled:
            gc.enable()


def _collect() -> None:
    """Collect all garbage. The collector does nothing as long as another thread collects."""
    before = _full_collections()
    while _full_collections() == before:
        gc.collect()
        time.sleep(0.001)


def _full_collections() -> int:
    return gc.get_stats()[-1]["collections"]
