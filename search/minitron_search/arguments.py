"""Checks of what callers give to this package's public functions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from numbers import Integral, Real
from typing import Any

from minitron.errors import InputError

_NAMES: dict[type, str] = {
    Real: "a number",
    Integral: "a whole number",
    Mapping: "a dict",
    str: "text",
    tuple: "a tuple",
}


def check_type(name: str, value: Any, kind: type) -> None:
    """Raise InputError naming `name` unless `value` is a `kind`; a bool is no number."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError(f"{name}: {type(value).__name__} given", f"give {_NAMES.get(kind, kind.__name__)}")


def check_types(name: str, values: Any, kind: type) -> None:
    """The same of every element of a list or another collection."""
    if not isinstance(values, Collection) or isinstance(values, str | bytes):
        raise InputError(f"{name}: {type(values).__name__} given", f"give a list of {kind.__name__}")
    for index, value in enumerate(values):
        check_type(f"{name}.{index}", value, kind)
