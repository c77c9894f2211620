"""Suites: named lists of benchmarks with their settings, as YAML files of the package or the user's own."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from minitron.arguments import check_fields, short_repr
from minitron.errors import InputError
from minitron.packages import PACKAGE, package_path
from minitron.storage import is_local, local_path

FOLDER = Path(__file__).resolve().parent / "definitions" / "suites"
# Tasks whose documents are those of another one, and may be in its folder.
SAME_DOCUMENTS = {
    "truthfulqa_mc1": "truthfulqa_mc",
    "truthfulqa_mc2": "truthfulqa_mc",
    "humaneval_instruct": "humaneval",
    "mbpp_instruct": "mbpp",
    "xlsum_en": "xlsum",
}


@dataclass(frozen=True)
class SuiteTask:
    """A task of a suite, with fields of `minitron.evaluation.Task`."""

    name: str
    num_fewshot: int = 0
    limit: float | None = None
    chat_template: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Suite:
    """A named list of tasks. version: raised whenever a task or setting changes, so that scores are compared with the same."""

    name: str
    version: int
    description: str
    tasks: tuple[SuiteTask, ...]

    def __post_init__(self) -> None:
        check_fields(self)


def suites() -> list[str]:
    """Names of the suites that are part of the package."""
    return [path.stem for path in sorted(FOLDER.glob("*.yaml"))]


def suite(name: str) -> Suite:
    """The suite of this name, or in a file of the user's, whose name ends in .yaml or .yml. Raises InputError if there is none,
    and for a file that is not a suite."""
    if name.endswith((".yaml", ".yml")):
        return _read(local_path(name))
    known = suites()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise InputError(
            f"suite {short_repr(name)}: does not exist",
            f"{hint}use one of {', '.join(known)}, or a file that ends in .yaml",
        )
    return _of_package(name)


@lru_cache(maxsize=8)
def _of_package(name: str) -> Suite:
    return _read(FOLDER / f"{name}.yaml")


def _read(path: Path) -> Suite:
    remedy = (
        "write the keys name, version (a whole number), description and tasks, a list of {name, num_fewshot, limit, "
        "chat_template}"
    )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"suite {path}: cannot be read ({error.strerror})", "check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"suite {path}: is not YAML ({' '.join(str(error).split())[:200]})", remedy) from error
    if not isinstance(values, dict):
        raise InputError(f"suite {path}: {'is empty' if values is None else 'has no keys'}", remedy)
    if wrong := list(_wrong_keys(values)):
        raise InputError(f"suite {path}: {'; '.join(wrong)}", remedy)
    try:
        made = tuple(SuiteTask(**entry) for entry in values["tasks"])
        whole = Suite(values["name"], values["version"], values.get("description", ""), made)
    except InputError as error:
        raise InputError(f"suite {path}: {error.problem}", error.remedy) from error
    first: dict[tuple[str, int], int] = {}
    for number, task in enumerate(made):
        if (same := first.setdefault((task.name, task.num_fewshot), number)) != number:
            raise InputError(
                f"suite {path}: tasks.{same} and tasks.{number} are both {task.name} with num_fewshot {task.num_fewshot}, "
                "and scores are kept by both",
                "leave one of them out, or give it another num_fewshot",
            )
    return whole


def _wrong_keys(values: dict[Any, Any]) -> Iterator[str]:
    """What keeps the content of a file from being a suite, apart from the values of the settings."""
    for what, keys in (
        ("lacks", [key for key in ("name", "version", "tasks") if key not in values]),
        ("has the unknown", [key for key in values if key not in (field.name for field in fields(Suite))]),
    ):
        if keys:
            yield f"{what} {', '.join(short_repr(key) for key in keys)}"
    tasks = values.get("tasks", [{"name": ""}])
    if not isinstance(tasks, list) or not tasks:
        yield "tasks is not a list of at least one task"
        return
    known = [field.name for field in fields(SuiteTask)]
    for number, entry in enumerate(tasks):
        if not isinstance(entry, dict):
            yield f"tasks.{number} is {short_repr(entry)}, not an object such as {{name: piqa}}"
            continue
        if "name" not in entry:
            yield f"tasks.{number} has no name"
        if unknown := [key for key in entry if key not in known]:
            yield f"tasks.{number} has the unknown {', '.join(short_repr(key) for key in unknown)}"


def settings_of(suite: Suite) -> list[dict[str, Any]]:
    """The tasks of a suite as keyword arguments of `minitron.evaluation.Task`, without those that have their default."""
    defaults = {field.name: field.default for field in fields(SuiteTask)}
    return [
        {key: value for key, value in vars(task).items() if key == "name" or value != defaults[key]}
        for task in suite.tasks
    ]


def folder_of(data: str, task: str) -> str:
    """The folder of a task's documents in `data`, a folder with one folder per task, which may be inside an installed package.

    It has the name of the task, or of the benchmark if the documents of several tasks are the same (SAME_DOCUMENTS); or it is
    in the folder of a larger group, as a subject of MMLU. Where there is none, or no such package, it is one that does not
    exist, which `check_tasks` refuses. In remote storage it is looked for when the documents are read
    (`minitron.evaluation.remote_documents`).
    """
    address = f"{data.rstrip('/')}/{task}"
    if data.startswith(PACKAGE):
        try:
            folder = package_path(data)
        except InputError:
            return address
        return f"{data.rstrip('/')}/{folder_in(task, _local_entries(folder))}"
    return str(local_path(data) / folder_in(task, _local_entries(local_path(data)))) if is_local(data) else address


Entries = Callable[[str], dict[str, bool]]
"""The names directly in a folder, by its path below the data, and whether each is a folder; empty if it does not exist."""


def folder_in(task: str, entries: Entries) -> str:
    """Path of a task's folder below the data; the task's name if there is none."""
    top = entries("")
    for name in (task, SAME_DOCUMENTS.get(task, task)):
        if name in top:
            return name
    return _inside_group(task, entries) or task


def _local_entries(folder: Path) -> Entries:
    def entries(inner: str) -> dict[str, bool]:
        path = folder / inner
        return {each.name: each.is_dir() for each in path.iterdir()} if path.is_dir() else {}

    return entries


def _inside_group(task: str, entries: Entries) -> str | None:
    """The documents of a part of a group in the folder of the whole group: mmlu/anatomy for mmlu_anatomy, and mmlu, which has
    nothing but folders, for mmlu_stem. None if they are not there."""
    for end in [number for number, letter in enumerate(task) if letter == "_"]:
        whole, part = task[:end], task[end + 1 :]
        if not entries("").get(whole):
            continue
        inner = entries(whole)
        for name in (task, part):
            if inner.get(name):
                return f"{whole}/{name}"
        if all(inner.values()) and not any("state.json" in entries(f"{whole}/{name}") for name in inner):
            return whole
    return None
