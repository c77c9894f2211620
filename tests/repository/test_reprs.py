"""What the reprs of the packages' dataclasses print."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil

import torch

PACKAGES = ("minitron", "minitron_search", "minitron_platform")


def _dataclasses():
    """Every dataclass of the packages, public names and all others."""
    for package in map(importlib.import_module, PACKAGES):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name.endswith("__main__"):
                continue
            for value in vars(importlib.import_module(module.name)).values():
                if inspect.isclass(value) and value.__module__ == module.name and dataclasses.is_dataclass(value):
                    yield value


def _with_tensors(kind):
    """An instance with a tensor in every field that holds tensors; None if there is no such field."""
    fields = dataclasses.fields(kind)
    holders = {field.name for field in fields if "Tensor" in str(field.type)}
    value = object.__new__(kind)
    for field in fields:
        object.__setattr__(value, field.name, torch.ones(3) if field.name in holders else None)
    return value if holders else None


def test_no_repr_prints_tensors():
    values = [value for kind in _dataclasses() if (value := _with_tensors(kind)) is not None]
    assert {type(value).__name__ for value in values} >= {"ImportanceScores", "Selection"}
    for value in values:
        assert "tensor(" not in repr(value)
