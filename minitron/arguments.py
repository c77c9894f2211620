"""Checks of what callers give to this package's public functions."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from functools import lru_cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from minitron.errors import InputError

_WORDS = {"Real": "a number", "Integral": "a whole number", "Mapping": "a dict", "str": "text", "Tensor": "a tensor"}


def short_repr(value: Any) -> str:
    """A plain value as Python writes it, for anything else its type; at most 80 characters, never a tensor's content."""
    if isinstance(value, str | int | float | bool | bytes | None):
        text = repr(value)
        return text if len(text) <= 80 else text[:77] + "..."
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def check_type(name: str, value: Any, kind: type | tuple[type, ...], description: str = "") -> None:
    """Raise InputError naming the argument `name` unless `value` is a `kind`; a bool is not accepted as a number.

    description: the kind in words, by default its name with an article.
    """
    if isinstance(value, kind) and not (isinstance(value, bool) and kind in (Real, Integral)):
        return
    expected = description or _in_words(kind if isinstance(kind, type) else kind[0])
    raise InputError(f"{name}: {short_repr(value)} is not {expected}", f"give {expected}")


def check_types(name: str, values: Any, kind: type) -> None:
    """Raise InputError naming the argument `name` unless `values` is a list, or another collection, of `kind`."""
    if not isinstance(values, Collection) or isinstance(values, str | bytes):
        raise InputError(f"{name}: {short_repr(values)} is not a list", f"give a list of {kind.__name__}")
    for index, value in enumerate(values):
        check_type(f"{name}.{index}", value, kind)


def _in_words(kind: type) -> str:
    return _WORDS.get(kind.__name__) or f"{'an' if kind.__name__[0] in 'AEIOUaeiou' else 'a'} {kind.__name__}"


def check_fields(settings: Any) -> None:
    """Raise InputError naming the first field of the dataclass `settings` whose value does not have the annotated type.

    Understood are str, bool, int, float (which an int is, too), Literal, tuple (which may be a list, as JSON gives it), other
    classes, and unions of one of them with None or a Literal. A bool is not accepted as a number.
    """
    hints = _hints(type(settings))  # type: ignore[arg-type]  # mypy takes no class for hashable
    for field in fields(settings):
        _check_hint(field.name, getattr(settings, field.name), hints[field.name])


@lru_cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _check_hint(name: str, value: Any, hint: Any) -> None:
    options = get_args(hint)
    if get_origin(hint) in (UnionType, Union):
        words = [word for option in options if get_origin(option) is Literal for word in get_args(option)]
        if (value is None and NoneType in options) or (isinstance(value, str) and value in words):
            return
        hint = next(option for option in options if option is not NoneType)
        options = get_args(hint)
    if get_origin(hint) is Literal:
        if not (isinstance(value, str) and value in options):
            raise InputError(f"{name}: {short_repr(value)} is not supported", f"use one of {', '.join(options)}")
    elif get_origin(hint) is tuple:
        check_type(name, value, (tuple, list), "a tuple")
        for index, item in enumerate(value):
            _check_hint(f"{name}[{index}]", item, options[0])
    else:
        check_type(name, value, {int: Integral, float: Real}.get(hint, hint), "true or false" if hint is bool else "")


def check_model(name: str, value: Any) -> None:
    """Raise InputError unless `value` is a loaded model with a transformers config."""
    from torch import nn  # torch takes seconds to import, and not every command needs it

    if not isinstance(value, nn.Module) or not hasattr(value, "config"):
        raise InputError(
            f"{name}: {short_repr(value)} is not a transformers model",
            "give a loaded model, for example AutoModelForCausalLM.from_pretrained(...)",
        )


def check_tokenizer(name: str, value: Any) -> None:
    """Raise InputError unless `value` encodes text."""
    if not callable(getattr(value, "encode", None)) or isinstance(value, str):
        raise InputError(
            f"{name}: {short_repr(value)} is not a tokenizer",
            "give a loaded tokenizer, for example AutoTokenizer.from_pretrained(...)",
        )


def check_rows(name: str, value: Any, *, shortest: int = 1) -> None:
    """Raise InputError unless `value` is an int64 tensor [num_rows, seq_length] of one row or more of `shortest` tokens."""
    import torch

    shape = f"int64 [num_rows, seq_length], num_rows >= 1, seq_length >= {shortest}"
    if not isinstance(value, torch.Tensor):
        raise InputError(f"{name}: {short_repr(value)} is not a tensor", f"give token ids as {shape}")
    if value.dtype != torch.int64 or value.ndim != 2 or len(value) < 1 or value.shape[1] < shortest:
        raise InputError(f"{name}: {value.dtype} {list(value.shape)}", f"give token ids as {shape}")
