"""Where the definition of a task or group is: in lm-eval's package, in this one, or in a folder of the user's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minitron.errors import InputError

OWN = Path(__file__).resolve().parent / "definitions" / "tasks"
_TASK = re.compile(r"^\"?task\"?:[ \t]*[\"']?([^\s\"'#\[]+)", re.MULTILINE)
_GROUP = re.compile(r"^\"?group\"?:[ \t]*[\"']?([^\s\"'#\[]+)", re.MULTILINE)
_INCLUDE = re.compile(r"^\"?include\"?:[ \t]*[\"']?([^\s\"'#\[]+)", re.MULTILINE)
_TAGS = re.compile(r"^\"?tag\"?:[ \t]*(?:[\"']?([^\s\"'#\[]+)|\n((?:[ \t]*-[ \t]*\S+[ \t]*\n?)+))", re.MULTILINE)


@dataclass(frozen=True)
class Index:
    """The definitions below a folder, by name."""

    tasks: dict[str, Path] = field(default_factory=dict)
    groups: dict[str, Path] = field(default_factory=dict)
    tags: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of the tasks with a tag."""


def tasks_folder() -> Path:
    """Folder of lm-eval's definitions. Raises InputError if lm-eval is not installed."""
    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("lm-eval is not installed", "pip install 'lm-eval>=0.4.13'")
    # resolved, because the paths that definitions refer to are resolved too
    return Path(spec.submodule_search_locations[0], "tasks").resolve()


@lru_cache(maxsize=1)
def stock() -> Index:
    """lm-eval's definitions, and ours of tasks that it does not have."""
    of_lm_eval, own = index(tasks_folder()), index(OWN)
    return Index(own.tasks | of_lm_eval.tasks, of_lm_eval.groups, of_lm_eval.tags)


def index(folder: Path) -> Index:
    """The definitions in a folder. Files are not parsed as YAML: lm-eval's index, which does, takes 8 s for its 14,000."""
    tasks: dict[str, Path] = {}
    groups: dict[str, Path] = {}
    tags: dict[str, list[str]] = {}
    texts: dict[Path, str] = {}
    for path in sorted(folder.rglob("*.yaml")):
        text = _text(path, texts)
        if match := _GROUP.search(text):
            groups.setdefault(match.group(1), path)
        if (match := _TASK.search(text)) is None:
            continue
        if match.group(1) not in tasks:
            tasks[match.group(1)] = path
            for tag in _tags(path, texts):
                tags.setdefault(tag, []).append(match.group(1))
    return Index(tasks, groups, {tag: tuple(names) for tag, names in tags.items()})


def _text(path: Path, texts: dict[Path, str]) -> str:
    if path not in texts:
        texts[path] = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return texts[path]


def _tags(path: Path, texts: dict[Path, str], depth: int = 8) -> list[str]:
    """The tags of a definition: its own, or those of the file that it includes."""
    text = _text(path, texts)
    if match := _TAGS.search(text):
        listed = match.group(2) or match.group(1)
        return [name.strip(" \t-\"'") for name in listed.split("\n") if name.strip(" \t-\"'")]
    include = _INCLUDE.search(text)
    return _tags(path.parent / include.group(1), texts, depth - 1) if include and depth else []


@dataclass(frozen=True)
class Group:
    """A group of tasks that is scored as one."""

    members: dict[str, Path]
    """Definition by name."""
    by_size: bool = True
    """Whether its score is the mean over all documents, or over the tasks."""


def group(name: str, known: Index, read: Any) -> Group:
    """The group or tag of this name. read: a function that reads a definition.

    Raises InputError for a group whose definition changes its tasks, and for members that do not exist.
    """
    members = {member: known.tasks[member] for member in _members(name, known, read, ())}
    by_size = True
    if name in known.groups:
        entries = read(known.groups[name]).get("aggregate_metric_list") or [{}]
        first = entries[0] if isinstance(entries, list) else entries
        by_size = bool(first.get("weight_by_size", True))
    return Group(members, by_size)


def _members(name: str, known: Index, read: Any, parents: tuple[str, ...]) -> Iterator[str]:
    if name in parents:
        raise InputError(f"task group {name!r}: contains itself", "remove it from its own list")
    if name in known.tasks:
        yield name
    elif name in known.groups:
        entries = read(known.groups[name]).get("task")
        for entry in [entries] if isinstance(entries, str) else entries or []:
            if isinstance(entry, Mapping):
                raise InputError(
                    f"task group {parents[0] if parents else name!r}: its definition changes the tasks that it lists, which "
                    "is not supported",
                    "name its tasks one by one",
                )
            yield from _members(str(entry), known, read, (*parents, name))
    elif name in known.tags:
        yield from known.tags[name]
    else:
        raise InputError(
            f"task group {parents[0]!r}: lists {name!r}, which does not exist", "name its tasks one by one"
        )
