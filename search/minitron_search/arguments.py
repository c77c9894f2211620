"""Checks of the arguments of this package's public functions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from numbers import Integral, Real
from typing import Any

from minitron import storage
from minitron.errors import InputError

_NAMES: dict[type, str] = {
    Real: "a number",
    Integral: "a whole number",
    Mapping: "a dict",
    str: "a string",
    tuple: "a tuple",
}


def check_type(name: str, value: Any, kind: type) -> None:
    """Raise InputError naming `name` unless `value` is a `kind`; a bool does not count as a number."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError(f"{name}: {type(value).__name__} given", f"give {_NAMES.get(kind, kind.__name__)}")


def check_types(name: str, values: Any, kind: type) -> None:
    """Raise InputError unless `values` is a list, or another collection, of `kind`."""
    if not isinstance(values, Collection) or isinstance(values, str | bytes):
        raise InputError(f"{name}: {type(values).__name__} given", f"give a list of {kind.__name__}")
    for index, value in enumerate(values):
        check_type(f"{name}.{index}", value, kind)


def absolute_path(name: str, path: Any) -> str:
    """`path`, a local path or an address such as s3://bucket/folder, made independent of the working directory: Ray Tune runs
    each trial in a folder of its own. Raises InputError naming `name` if it is no string, or empty."""
    check_type(name, path, str)
    if not path:
        raise InputError(f"{name}: the path is empty", "give a path")
    return storage.absolute(path)
