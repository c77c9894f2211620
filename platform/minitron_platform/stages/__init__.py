"""The stages of a run, in order.

A stage is a module with `inputs(context)`, a JSON value of everything that can change its result, and
`run(context, folder)`, which does the work in its folder and returns its outputs as a JSON value with a `summary`.
It may also have `record(context, outputs)`, which completes the run's record, and `holds(context, outputs)`, which says
whether what it did elsewhere is still so.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol

from minitron_platform.stages.context import Context

BEFORE = ("teacher", "data", "correct")  # done once for the whole family
MEMBER = ("calibrate", "search", "distill", "evaluate", "register")  # done for each model of it
TARGETS = "targets"  # once too, before the first search: calibrating needs none
NAMES = (*BEFORE, MEMBER[0], TARGETS, *MEMBER[1:])


class Stage(Protocol):
    VERSION: int

    def inputs(self, context: Context) -> dict[str, Any]: ...

    def run(self, context: Context, folder: str) -> dict[str, Any]: ...


def load(name: str) -> Stage:
    """The stage's module; imported when it is needed, since some bring large libraries."""
    return import_module(f"{__name__}.{name}")
