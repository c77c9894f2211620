"""What MLflow takes as the alias of a registered model."""

from __future__ import annotations

import re

ALLOWED = re.compile(r"^[A-Za-z0-9_-]{1,255}$")
VERSION = re.compile(r"^[vV]\d+$")


def check_alias(alias: str) -> str:
    """`alias`, if MLflow takes it. Raises ValueError, which says why not."""
    if not ALLOWED.fullmatch(alias):
        raise ValueError("an alias has letters, digits, '_' and '-' only")
    if alias.lower() == "latest" or VERSION.fullmatch(alias):
        raise ValueError("MLflow keeps `latest` and `v` with a number for itself")
    return alias
