"""The recipe's file: read with overrides, checked, and written."""

from __future__ import annotations

import difflib
import importlib.resources
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from minitron.errors import InputError
from minitron.packages import PACKAGE
from minitron.storage import is_local, local_path
from minitron_platform.recipes.schema import Recipe


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads 6e-4 and 9e7 as numbers, which YAML 1.1 takes for text, and 29:13 as the text it is, which
    YAML 1.1 takes for 29 minutes."""


_NUMBERS = {
    "tag:yaml.org,2002:int": r"^[-+]?(0|[1-9][0-9_]*)$",
    "tag:yaml.org,2002:float": r"^[-+]?(\d[\d_]*(\.[\d_]*([eE][-+]?\d+)?|[eE][-+]?\d+)|\.\d+([eE][-+]?\d+)?|\.inf)$",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list("-+0123456789."))


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with the package, by name."""
    folder = Path(str(importlib.resources.files("minitron_platform") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """A shipped recipe by its name, or one of yours by its path, with `a.b=value` overrides applied.

    Raises InputError naming the file, the key, the value and the remedy.
    """
    shipped = shipped_recipes()
    path = shipped.get(name_or_path) or Path(name_or_path).expanduser()
    if not path.is_file():
        close = difflib.get_close_matches(name_or_path, shipped, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InputError(
            f"{name_or_path!r} is neither a recipe that ships ({', '.join(shipped)}) nor a file",
            f"{hint}see `minitron recipes`, or give the path of a YAML file",
        )
    try:
        values = yaml.load(path.read_text(), Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", "check its permissions") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML ({_one_line(error)})", "mend the line it names") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds no keys", "start from a recipe that ships: `minitron recipes`")
    values = _unshared(values)
    for override in overrides:
        _override(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise _explain(path, values, error) from error


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe in full, as `load_recipe` reads it."""
    return yaml.safe_dump(recipe.model_dump(by_alias=True), sort_keys=False)


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The same recipe with its local paths independent of the working directory, to be sent elsewhere."""
    values = recipe.model_dump(by_alias=True)
    tasks = [*values["evaluate"]["tasks"], *filter(None, [values["calibrate"]["task"]])]
    tasks += (values["search"]["evaluate"] or {"tasks": []})["tasks"]
    paths = [(task, "data") for task in tasks]
    if recipe.data.kind != "hub" or local_path(recipe.data.path).exists():
        paths.append((values["data"], "path"))
    if local_path(recipe.teacher.model).exists():  # else it is a hub name
        paths.append((values["teacher"], "model"))
    for section, key in paths:
        value = section[key]
        if value and is_local(value) and not value.startswith(PACKAGE):
            section[key] = str(local_path(value))
    return Recipe.model_validate(values)


def _unshared(values: Any) -> Any:
    """A copy in which what YAML anchors made one thing is several, so that an override changes only the one it names."""
    if isinstance(values, dict):
        return {key: _unshared(value) for key, value in values.items()}
    return [_unshared(value) for value in values] if isinstance(values, list) else values


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise InputError(f"--set {override!r} is not KEY=VALUE", "write it as --set distill.steps=50")
    *parents, last = key.split(".")
    place: Any = values
    for index, parent in enumerate(parents):
        place = _enter(place, parent, key) if index or parent in place else place.setdefault(parent, {})
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise InputError(f"--set {override!r}: the value is not valid YAML ({_one_line(error)})", "quote it") from error
    if isinstance(place, list):
        place[_position(place, last, key)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise InputError(f"--set {key}: {'.'.join(parents)} is a single value", "name a key of a section")


def _enter(place: Any, part: str, key: str) -> Any:
    if isinstance(place, list):
        return place[_position(place, part, key)]
    if not isinstance(place, dict):
        raise InputError(f"--set {key}: there is no section above {part!r}", "see the recipe's keys in its file")
    return place.setdefault(part, {})


def _position(values: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(values):
        raise InputError(f"--set {key}: {part!r} is not a position in a list of {len(values)}", "count from 0")
    return int(part)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _explain(path: Path, values: dict[str, Any], error: ValidationError) -> InputError:
    """The first thing that is wrong with `values`, as one sentence about a key."""

    def key_of(wrong: Any) -> str:
        return ".".join(str(part) for part in _keys(values, wrong["loc"], missing=wrong["type"] == "missing"))

    first, *others = error.errors()
    key, value = key_of(first), first["input"]
    instead = [e for e in others if key_of(e) == key]  # of a union, what else could stand there
    count = len(others) - len(instead)
    more = f" (and {count} more)" if count else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"][:-1])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return InputError(f"{path}: {key}: unknown key{more}", f"{hint}known here: {', '.join(known)}")
    if first["type"] == "missing":
        return InputError(f"{path}: {key}: missing{more}", "add the key; the recipes that ship show every one")
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    message += "".join(f", or {e['ctx']['expected']}" for e in instead if e["type"] == "literal_error")
    if not first["loc"]:
        return InputError(f"{path}: family: {message}", "change the list of models")
    return InputError(f"{path}: {key}: {value!r} is not valid: {message}{more}", f"change {key}, or --set {key}=…")


def _keys(values: Any, location: tuple[int | str, ...], *, missing: bool) -> Iterator[int | str]:
    """What of pydantic's location of an error are keys and positions in `values`; the branches of a union are not."""
    for number, part in enumerate(location, start=1):
        if isinstance(values, dict) and (part in values or (missing and number == len(location))):
            yield part
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int):
            yield part
            values = values[part]


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    model: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        name = next((n for n, f in model.model_fields.items() if part in (n, f.alias)), None)
        annotation = model.model_fields[name].annotation if name else None
        inner = getattr(annotation, "__args__", (annotation,))[0]
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return [field.alias or name for name, field in model.model_fields.items()]
