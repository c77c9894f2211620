"""Suites: named lists of benchmarks with their settings, as YAML files of the package."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from minitron.arguments import check_fields, short_repr
from minitron.errors import InputError
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


def suites() -> list[str]:
    """Names of the suites that are part of the package."""
    return [path.stem for path in sorted(FOLDER.glob("*.yaml"))]


@lru_cache(maxsize=8)
def suite(name: str) -> Suite:
    """The suite of this name. Raises InputError if there is none."""
    known = suites()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise InputError(f"suite {short_repr(name)}: does not exist", f"{hint}use one of {', '.join(known)}")
    values: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return Suite(
        name=values["name"],
        version=values["version"],
        description=values["description"],
        tasks=tuple(SuiteTask(**entry) for entry in values["tasks"]),
    )


def settings_of(name: str) -> list[dict[str, Any]]:
    """The tasks of a suite as keyword arguments of `minitron.evaluation.Task`, without those that have their default."""
    defaults = {field.name: field.default for field in fields(SuiteTask)}
    return [
        {key: value for key, value in vars(task).items() if key == "name" or value != defaults[key]}
        for task in suite(name).tasks
    ]


def folder_of(data: str, task: str) -> str:
    """The folder of a task's documents in `data`, a folder with one folder per task.

    It has the name of the task, or of the benchmark if the documents of several tasks are the same (SAME_DOCUMENTS).
    """
    shared = SAME_DOCUMENTS.get(task, task)
    if data.startswith("package:") or not is_local(data):
        return f"{data.rstrip('/')}/{task}"
    folder = local_path(data)
    return str(folder / (shared if not (folder / task).exists() and (folder / shared).exists() else task))
