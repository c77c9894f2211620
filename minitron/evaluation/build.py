"""lm-eval's tasks with their documents loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minitron.evaluation.benchmarks import RENAMED_FIELDS
from minitron.evaluation.document_splits import read_split, with_nulls
from minitron.evaluation.generated_code import guarded_metrics, may_load_metrics, runs_generated_code, sandboxed
from minitron.evaluation.own_tasks import allowed_roots
from minitron.evaluation.questions import Documents
from minitron.evaluation.requirements import check_nltk_data
from minitron.evaluation.sandbox import Sandbox
from minitron.evaluation.splits import local_definition
from minitron.evaluation.tasks import Part, Task, read_definition, scored_documents
from minitron.evaluation.templates import sandboxed_templates

if TYPE_CHECKING:
    import datasets
    from lm_eval.api.task import Task as HarnessTask

FEWSHOT_SEED = 1234  # lm-eval's default, so that the few-shot examples are those of published scores


def build(task: Task, part: Part) -> HarnessTask:
    """The lm-eval task of `part` with its documents loaded. Raises InputError for documents that do not fit the definition."""
    with sandboxed_templates(), metrics_guard(task, part):
        return _build(task, part)


def metrics_guard(task: Task, part: Part) -> AbstractContextManager[None]:
    """`guarded_metrics` for a definition that may need it."""
    if may_load_metrics(read_definition(part.definition, functions=False), allowed_roots(task.folder)):
        return guarded_metrics(task.name, allowed=task.allow_code)
    return nullcontext()


def _build(task: Task, part: Part) -> HarnessTask:
    from jinja2 import UndefinedError
    from lm_eval.tasks import TaskManager

    roots = allowed_roots(task.folder)
    by_name = read_definition(part.definition, functions=False)
    check_nltk_data(task.name, by_name, roots)  # importing the functions would download it
    config = read_definition(part.definition, functions=True)
    if "langdetect" in sys.modules:  # which IFEval asks for the language of an answer; it draws at random
        sys.modules["langdetect"].DetectorFactory.seed = 0
    sandbox = None
    if runs_generated_code(by_name, roots):
        config, sandbox = sandboxed(task.name, config, by_name, roots)
    if part.splits is None:
        return _configured(task, TaskManager(include_defaults=False).load([config])["tasks"][part.name], sandbox)
    local = _local_documents(task, part, config)
    try:
        built = TaskManager(include_defaults=False).load([local.config])["tasks"][part.name]
    except (KeyError, IndexError, ValueError, TypeError, AttributeError, AssertionError, UndefinedError) as error:
        # lm-eval makes the first question
        scored = documents_of(task, part, part.scored)
        documents = local.documents[part.scored]
        raise scored.misfit(scored.place(0, len(documents)), error, documents[0] if len(documents) else {}) from error
    _configured(task, built, sandbox)
    for name, numbers in local.incomplete.items():
        documents_of(task, part, name).check_incomplete(built, local.read[name], numbers, local.prepare)
    return built


def _configured(task: Task, built: HarnessTask, sandbox: Sandbox | None) -> HarnessTask:
    built.set_config(key="num_fewshot", value=task.num_fewshot)
    built.set_fewshot_seed(seed=FEWSHOT_SEED)
    built.minitron_sandbox = sandbox  # which knows what went wrong in programs; None without any
    return built


def documents_of(task: Task, part: Part, split: str) -> Documents:
    """The local documents of a split, for errors about them."""
    assert part.splits is not None
    return Documents(task.name, part.definition, part.splits[split])


@dataclass(frozen=True)
class _Local:
    """A definition with local documents."""

    config: dict[str, Any]
    read: dict[str, datasets.Dataset]
    """The documents by split as they are in the files."""
    documents: dict[str, datasets.Dataset]
    """The same as the definition uses them."""
    prepare: Callable[[datasets.Dataset], datasets.Dataset]
    """What makes `documents` of `read`."""
    incomplete: dict[str, list[int]]
    """Numbers of the documents that are used and have nulls, or lack fields of the others."""


def _local_documents(task: Task, part: Part, config: dict[str, Any]) -> _Local:
    assert part.splits is not None
    config = local_definition(config, part.splits, part.scored)
    process = None
    # lm-eval would run process_docs over the whole split four times.
    if config.get("process_docs") is not None and "process_docs" not in (config["fewshot_config"] or {}):
        process = config.pop("process_docs")

    def prepare(split: datasets.Dataset) -> datasets.Dataset:
        present = split.column_names
        renamed = RENAMED_FIELDS.get(part.name, {}).items()
        split = split.rename_columns({old: new for old, new in renamed if old in present and new not in present})
        return split if process is None else process(split)

    used = [name for name in dict.fromkeys([part.scored, part.examples]) if name]
    read = {name: read_split(part.splits[name]) for name in used}
    documents = {name: documents_of(task, part, name).prepared(split, prepare) for name, split in read.items()}
    incomplete = {name: with_nulls(split) for name, split in read.items()}
    if part.scored != part.examples and len(read[part.scored]) == len(documents[part.scored]):
        count = scored_documents(task.limit, len(read[part.scored]))
        incomplete[part.scored] = [number for number in incomplete[part.scored] if number < count]
    for key in ("dataset_name", "dataset_kwargs"):
        config.pop(key, None)
    # lm-eval wants the split of the examples also for 0 of them: the scored one takes its place, unread
    every = {split: documents.get(split, documents[part.scored]) for split in part.splits}

    def load(**_: Any) -> dict[str, Any]:
        return every

    config = config | {"dataset_path": str(task.data), "custom_dataset": load}
    return _Local(config, read, documents, prepare, {name: found for name, found in incomplete.items() if found})
