"""MLflow's rules for the aliases of registered models."""

from __future__ import annotations

import re

ALLOWED = re.compile(r"^[A-Za-z0-9_-]{1,255}$")
VERSION = re.compile(r"^[vV]\d+$")


def check_alias(alias: str) -> str:
    """Return `alias` if MLflow accepts it. Raises ValueError with the reason if it does not."""
    if not ALLOWED.fullmatch(alias):
        raise ValueError("an alias may only have letters, digits, '_' and '-'")
    if alias.lower() == "latest" or VERSION.fullmatch(alias):
        raise ValueError("MLflow reserves `latest` and `v` followed by a number")
    return alias
