"""Local paths in a recipe: those of its file belong to the file's folder, those of overrides to the current folder."""

from __future__ import annotations

from collections.abc import Iterator
from glob import has_magic, iglob
from pathlib import Path
from typing import Any, overload

from minitron import storage
from minitron.errors import InputError
from minitron.packages import PACKAGE
from minitron.storage import is_local, local_path
from minitron_platform.recipes.schema import Recipe

PATHS = (
    ("teacher", "model"),
    ("data", "path"),
    ("data", "heldout", "path"),
    ("evaluate", "data"),
    ("evaluate", "task_folder"),
)
TEXTS = ("data", "sources")  # each with a key `path`
TASKS = (("calibrate", "task"), ("search", "evaluate", "tasks"), ("evaluate", "tasks"))  # each with a key `data`


@overload
def absolute(path: str) -> str: ...


@overload
def absolute(path: None) -> None: ...


def absolute(path: str | None) -> str | None:
    """A path that does not depend on the working directory, for processes with another one."""
    return path if path is None or path.startswith(PACKAGE) else storage.absolute(path)


def anchor_paths(values: dict[str, Any], folder: Path, source: str) -> None:
    """Make the relative local paths in a recipe's `values` absolute: they are below `folder`.

    A path that does not exist there remains as it is, because it may be a hub name; if it is not, it is refused later. source:
    the recipe's file. Raises InputError for a path that does not exist in `folder`, but in the current folder.
    """
    here = Path.cwd()
    for section, key, name in recipe_paths(values):
        text = section[key]
        if not _is_relative(text):
            continue
        inner = text.split("://", 1)[-1]
        if _exists(folder / inner):
            section[key] = str(folder.absolute() / inner)
        elif _exists(here / inner):
            raise InputError(
                f"{source}: {name}: {text!r} is not in {folder.absolute()}, to which the recipe's relative paths belong, "
                "but in the current folder",
                f"give the path from the recipe's folder, or --set {name}={text}",
            )


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with its local paths made absolute, for a process with another working directory."""
    values = recipe.model_dump(by_alias=True)
    for section, key, name in recipe_paths(values):
        text = section[key]
        may_be_on_the_hub = name == "teacher.model" or (key == "path" and section["kind"] == "hub")
        if is_local(text) and not text.startswith(PACKAGE) and (_exists(local_path(text)) or not may_be_on_the_hub):
            section[key] = str(local_path(text))
    return Recipe.model_validate(values)


def recipe_paths(values: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """(section, key, full name) of every path in `values`, which need not be valid yet."""
    for *parents, key in PATHS:
        section = _section(values, parents)
        if isinstance(section, dict) and section.get(key) and isinstance(section[key], str):
            yield section, key, ".".join([*parents, key])
    for keys, key in ((TEXTS, "path"), *((task, "data") for task in TASKS)):
        entries = _section(values, keys)
        for index, entry in enumerate(entries if isinstance(entries, list) else [entries]):
            if isinstance(entry, dict) and entry.get(key) and isinstance(entry[key], str):
                number = [str(index)] if isinstance(entries, list) else []
                yield entry, key, ".".join([*keys, *number, key])


def _section(values: Any, keys: tuple[str, ...] | list[str]) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _is_relative(text: str) -> bool:
    if text.startswith(("~", PACKAGE)) or not is_local(text):
        return False
    return not Path(text.split("://", 1)[-1]).is_absolute()


def _exists(path: Path) -> bool:
    """Whether a file, a folder or a match of a glob exists."""
    try:
        return path.exists() or (has_magic(str(path)) and next(iglob(str(path), recursive=True), None) is not None)
    except (OSError, ValueError):  # a name that is too long, or contains a null character
        return False
