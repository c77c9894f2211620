"""Recipe keys: those of a section, and their use in errors of code that does not know the recipe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel

from minitron.errors import InputError
from minitron_platform.recipes.schema import Recipe


@contextmanager
def named_by_key(key: str) -> Iterator[None]:
    """Put the recipe key `key` in front of an InputError that names none.

    An error that begins with a field of the section at `key`, such as "path: ..." for the key "data", becomes "data.path: ...";
    any other becomes "data: ...". An error that begins with a key of the recipe already, such as "family.0.space: ...", is
    raised unchanged.
    """
    try:
        yield
    except InputError as error:
        start, colon, _ = error.problem.partition(": ")
        if colon and _is_key(start):
            raise
        separator = "." if colon and start in section_keys(key) else ": "
        raise InputError(f"{key}{separator}{error.problem}", error.remedy) from error


def _is_key(text: str) -> bool:
    """Whether `text` is the key of a section or of one of its fields, or of something inside that field."""
    section, *inner = text.split(".")
    fields = [part for part in inner if not part.isdigit()]  # without the indices of a list
    return section in _sections() and (not fields or fields[0] in section_keys(section))


def section_keys(key: str) -> list[str]:
    """The keys of the section at `key`, such as "family.0.limits"; those of the recipe for "", none if it is not a section."""
    section: Any = Recipe
    for part in key.split(".") if key else ():
        if part.isdigit():  # an index of a list of sections
            continue
        field = next((f for name, f in section.model_fields.items() if part in (name, f.alias)), None)
        section = _section_type(field.annotation) if field else None
        if section is None:
            return []
    return [field.alias or name for name, field in section.model_fields.items()]


def _section_type(annotation: Any) -> type[BaseModel] | None:
    """The section in a field's type, which may be optional, a list or another type as well; None if there is none."""
    types = getattr(annotation, "__args__", (annotation,))
    return next((inner for inner in types if isinstance(inner, type) and issubclass(inner, BaseModel)), None)


def _sections() -> set[str]:
    """The keys of a recipe that are sections or lists of sections."""
    return {
        field.alias or name
        for name, field in Recipe.model_fields.items()
        if _section_type(field.annotation) is not None
    }
