"""Runs of recipes: the pipeline of stages on Ray, tracking and the model registry in MLflow, and the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minitron.lazy_names import lazy_names

if TYPE_CHECKING:
    from minitron_platform.pipeline import run as run
    from minitron_platform.planning.plan import plan as plan
    from minitron_platform.promotion import promote as promote
    from minitron_platform.recipes.load import load_recipe as load_recipe
    from minitron_platform.submission import submit as submit

_PUBLIC = {
    "load_recipe": "minitron_platform.recipes.load",
    "plan": "minitron_platform.planning.plan",
    "run": "minitron_platform.pipeline",
    "submit": "minitron_platform.submission",
    "promote": "minitron_platform.promotion",
}

__all__ = [*_PUBLIC]


__getattr__ = lazy_names(__name__, _PUBLIC)


def __dir__() -> list[str]:
    return sorted(__all__)
