"""Reading and writing of recipe files, with overrides and errors that name the key."""

from __future__ import annotations

import difflib
import importlib.resources
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from minitron.arguments import short_repr
from minitron.errors import InputError
from minitron.storage import secret_in
from minitron_platform.arguments import check_strings, path_string
from minitron_platform.recipes.keys import section_keys
from minitron_platform.recipes.paths import anchor_paths
from minitron_platform.recipes.schema import Recipe
from minitron_platform.recipes.yaml_text import parse_value, read_yaml

LONGEST_VALUE = 200  # characters of a value in an error
_SCALARS = {"int_type", "float_type", "string_type", "literal_error"}
_PLAIN = {  # by the type of pydantic's error, whose own message names Python classes or a regular expression
    "model_type": "it should be a section of keys and values",
    "dataclass_type": "it should be a section of keys and values",
    "list_type": "it should be a list",
    "tuple_type": "it should be a list",
    "string_type": "it should be text: put it in quotes",
    "int_type": "it should be a whole number",
    "float_type": "it should be a number",
    "finite_number": "it should be a finite number",
    "string_pattern_mismatch": "use at most 64 of a-z 0-9 . _ - and begin with a letter or digit",
}


def shipped_recipes() -> dict[str, Path]:
    """Paths of the recipes that are part of the package, by name."""
    folder = Path(str(importlib.resources.files("minitron_platform") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def shipped_recipe(name: str) -> Path:
    """Path of the recipe of this name that is part of the package. Raises InputError if there is none."""
    shipped = shipped_recipes()
    if name not in shipped:
        raise InputError(f"{short_repr(name)} is not a recipe that ships", f"use one of {', '.join(shipped)}")
    return shipped[name]


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe by its name, or a recipe file by its path, and apply `overrides` such as "distill.steps=50".

    Raises InputError, naming the file, the key, the value and a remedy, for a file that cannot be read and for values that
    are not valid, and for arguments of the wrong type.
    """
    name_or_path = path_string("name_or_path", name_or_path)
    check_strings("overrides", overrides)
    shipped = shipped_recipes()
    path = shipped.get(name_or_path) or Path(os.path.expanduser(name_or_path))
    if not os.path.isfile(path):
        close = difflib.get_close_matches(name_or_path, shipped, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InputError(
            f"{short_repr(name_or_path)} is neither a recipe that ships ({', '.join(shipped)}) nor a file",
            f"{hint}see `minitron recipes`, or give the path of a YAML file",
        )
    values = read_yaml(path)
    anchor_paths(values, path.parent, str(path))
    for override in overrides:
        _apply_override(values, override)
    anchor_paths(values, Path.cwd(), str(path))
    _check_secrets(values, f"{path}: ")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise _first_error(path, values, error) from error


def changed_recipe(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """`recipe` with `overrides` such as "distill.steps=50", which must be valid."""
    values = recipe.model_dump(by_alias=True)
    for override in overrides:
        _apply_override(values, override)
    return Recipe.model_validate(values)


def check_recipe_type(value: Any) -> None:
    """Raise InputError unless `value` is a recipe, for example for the name of one."""
    if not isinstance(value, Recipe):
        name = short_repr(value) if isinstance(value, str) else "..."
        raise InputError(f"recipe: {short_repr(value)} is not a recipe", f"give the result of load_recipe({name})")
    _check_secrets(value.model_dump(by_alias=True))


def _check_secrets(values: Any, file: str = "", key: str = "") -> None:
    """Raise InputError for an address with a secret: a run stores its recipe, and a job sends it."""
    if isinstance(values, dict | list | tuple):
        for name, value in values.items() if isinstance(values, dict) else enumerate(values):
            _check_secrets(value, file, f"{key}.{name}" if key else str(name))
    elif isinstance(values, str) and (secret := secret_in(values)):
        raise InputError(
            f"{file}{key}: an address with {secret}, and recipes are stored with their runs",
            "remove it from the address, and set the environment variables or files of that storage",
        )


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe with all its keys as YAML, which `load_recipe` reads."""
    return yaml.safe_dump(recipe.model_dump(by_alias=True), sort_keys=False)


def _apply_override(values: dict[str, Any], override: str) -> None:
    """Change `values` as "KEY=VALUE" says; missing sections are created."""
    key, separator, text = override.partition("=")
    if not separator or not re.fullmatch(r"\w+(\.\w+){0,9}", key, re.ASCII):
        raise InputError(f"--set {short_repr(override)} is not KEY=VALUE", "write it as --set distill.steps=50")
    *parents, last = key.split(".")
    section: Any = values
    for parent in parents:
        section = _subsection(section, parent, key)
    value = parse_value(text, f"--set {key}")
    if isinstance(section, list):
        section[_index(section, last, key)] = value
    elif isinstance(section, dict):
        section[last] = value
    else:
        raise InputError(f"--set {key}: {'.'.join(parents)} is a single value", "name a key of a section")


def _subsection(section: Any, name: str, key: str) -> Any:
    """The part of `section` called `name`; `key` is the override's, for messages."""
    if isinstance(section, list):
        return section[_index(section, name, key)]
    if not isinstance(section, dict):
        raise InputError(f"--set {key}: there is no section above {name!r}", "see the recipe's keys in its file")
    if section.get(name) is None:  # left out, or null
        section[name] = {}
    return section[name]


def _index(values: list[Any], text: str, key: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or int(text) >= len(values):
        raise InputError(f"--set {key}: {text!r} is not an index of a list of {len(values)}", "count from 0")
    return int(text)


def _first_error(path: Path, values: dict[str, Any], error: ValidationError) -> InputError:
    """The first error in `values` as an error about a key, with the number of the others."""

    def key_of(detail: Any) -> str:
        return ".".join(str(part) for part in _keys(values, detail["loc"], missing=detail["type"] == "missing"))

    # a default that follows from another key cannot be computed while that one is not valid
    errors = [detail for detail in error.errors() if detail["type"] != "default_factory_not_called"]
    errors = [detail for detail in errors if not _of_another_kind(detail, errors)]
    # a misspelt key is also a missing one
    first, *others = sorted(errors, key=lambda detail: detail["type"] == "missing")
    key = key_of(first)
    value = first["input"]
    alternatives = [detail for detail in others if key_of(detail) == key]  # the other types of a union
    count = len(others) - len(alternatives)
    more = f" (and {count} more)" if count else ""
    if first["type"] == "extra_forbidden":
        known = section_keys(key.rpartition(".")[0])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return InputError(f"{path}: {key}: unknown key{more}", f"{hint}known here: {', '.join(known)}")
    if first["type"] == "missing":
        return InputError(f"{path}: {key}: missing{more}", "add the key; docs/recipes.md describes it")
    message = first["msg"].removeprefix("Value error, ")
    message = _PLAIN.get(first["type"], message)
    if message[1:2].islower():  # not of "MLflow"
        message = message[0].lower() + message[1:]
    message += "".join(f", or {e['ctx']['expected']}" for e in alternatives if e["type"] == "literal_error")
    if not first["loc"]:
        return InputError(f"{path}: family: {message}", "change the list of models")
    return InputError(
        f"{path}: {key}: {_shown(value)} is not valid: {message}{more}", f"change {key}, or --set {key}=…"
    )


def _of_another_kind(detail: Any, errors: list[Any]) -> bool:
    """Whether an error says that a section should be a number or a text, and others say what is wrong in that section."""
    union = detail["loc"][:-1]
    is_scalar = isinstance(detail["input"], dict) and detail["type"] in _SCALARS
    return is_scalar and any(e["type"] not in _SCALARS and e["loc"][: len(union)] == union for e in errors)


def _shown(value: Any) -> str:
    """A value as Python writes it, unless that is long."""
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else short_repr(value)


def _keys(values: Any, location: tuple[int | str, ...], *, missing: bool) -> Iterator[int | str]:
    """The keys and indices in `values` of a pydantic error's location, without the names of union branches."""
    for number, part in enumerate(location, start=1):
        if isinstance(values, dict) and (part in values or (missing and number == len(location))):
            yield part
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int):
            yield part
            values = values[part]
