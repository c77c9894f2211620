"""Checks of what callers give to this package's public functions, in addition to those of `minitron.arguments`."""

from __future__ import annotations

from typing import Any

from minitron import storage
from minitron.arguments import check_type
from minitron.errors import InputError


def absolute_path(name: str, path: Any) -> str:
    """`path`, a local path or an address such as s3://bucket/folder, made independent of the working directory, because Ray
    Tune runs each trial in a folder of its own. Raises InputError naming the argument `name` if it is empty or not a string."""
    check_type(name, path, str)
    if not path:
        raise InputError(f"{name}: the path is empty", "give a path")
    return storage.absolute(path)
