"""Checks of the arguments of this package's public functions. The command line gives them the right types by itself."""

from __future__ import annotations

import os
from typing import Any

from minitron.arguments import check_type


def check_optional_string(name: str, value: Any) -> None:
    """Raise InputError unless `value` is a string or None."""
    if value is not None:
        check_type(name, value, str, "a string")


def path_string(name: str, value: Any) -> str:
    """`value`, a string or a pathlib.Path, as a string. Raises InputError for other types."""
    check_type(name, value, (str, os.PathLike), "a path")
    return os.fspath(value)


def check_strings(name: str, values: Any) -> None:
    """Raise InputError unless `values` is a list or tuple of strings; a single string is not."""
    check_type(name, values, (list, tuple), "a list of strings")
    for index, value in enumerate(values):
        check_type(f"{name}[{index}]", value, str, "a string")
