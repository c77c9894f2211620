"""The start of a worker that computes with models: mostly imports, which come in one go. This module itself imports nothing
that takes long."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from minitron.garbage import collector_off

LIBRARIES = ("minitron.distill.loop", "minitron.meta_models", "transformers.models.auto.modeling_auto")


@cache
def import_libraries() -> None:
    """Import, once, what every worker with a model needs, before it computes anything."""
    with collector_off():
        from minitron.distill.determinism import allow_deterministic_products
        from minitron.model_imports import import_models

        allow_deterministic_products()
        import_models()
        for name in LIBRARIES:
            import_module(name)
