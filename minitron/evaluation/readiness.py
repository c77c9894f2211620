"""Whether tasks can run: everything that they lack, before a model is loaded.

The documents are read, and the questions made of them as an evaluation makes them, so that the two cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from minitron.arguments import check_type
from minitron.errors import InputError, together
from minitron.evaluation.build import build, documents_of
from minitron.evaluation.document_splits import read_split
from minitron.evaluation.documents import locate_documents
from minitron.evaluation.generated_code import hub_metrics, runs_generated_code
from minitron.evaluation.own_tasks import allowed_roots
from minitron.evaluation.questions import check_questions
from minitron.evaluation.requirements import (
    check_documents,
    check_metrics,
    check_nltk_data,
    check_packages,
    check_room,
)
from minitron.evaluation.sandbox import check_sandbox
from minitron.evaluation.tasks import (
    Part,
    Task,
    check_code_allowed,
    check_settings,
    checked_definition,
    members,
    part_of,
    scored_documents,
)
from minitron.evaluation.templates import sandboxed_templates

MOST_ALIKE = 2  # gaps with one remedy of one task; each of a group's many tasks may lack the same


def check_ready(tasks: Sequence[Task], longest: int | None = None) -> None:
    """Raise InputError for tasks that cannot run, naming everything that any of them lacks. longest: as for `task_gaps`."""
    check_settings(tasks)
    if gaps := [gap for task in tasks for gap in task_gaps(task, longest)]:
        raise together(gaps)


def check_requirements(task: Task, longest: int | None = None) -> None:
    """Raise InputError naming what a task lacks on this machine, as `task_gaps` lists it."""
    check_type("task", task, Task)
    if gaps := task_gaps(task, longest):
        raise together(gaps)


def task_gaps(task: Task, longest: int | None = None) -> list[InputError]:
    """What a task lacks on this machine: what `check_tasks` refuses, packages, metrics, data of NLTK, the sandbox, room for its
    answers in a context of `longest` tokens, documents on the hub or in its cache (contacted with a short timeout), and local
    documents of which its questions can be made. Of documents on the hub the content is not read."""
    gaps = _Gaps()
    definitions, folder = {}, None
    with gaps.noted():
        definitions = members(task)
    located = task.data is None
    if task.data is not None and definitions:
        with gaps.noted():
            folder = locate_documents(task.data)
            located = True
    roots = allowed_roots(task.folder) if definitions else ()
    for name, definition in definitions.items():
        before = len(gaps.found)
        with gaps.noted():
            config = checked_definition(task, definition)
            with gaps.noted():
                check_code_allowed(task, config)
            with gaps.noted():
                check_packages(task.name, config, roots)
                check_nltk_data(task.name, config, roots)  # asks the package
            with gaps.noted():
                if task.allow_code:
                    check_metrics(task.name, hub_metrics(config, roots))
            with gaps.noted():
                if runs_generated_code(config, roots):
                    check_sandbox()
            with gaps.noted():
                check_room(task.name, config, longest)
            if not located:
                continue
            part = part_of(task, name, definition, config, folder)
            if part.splits is None:
                check_documents(task.name, config)
            elif len(gaps.found) == before:
                _check_content(task, part, only_read=bool(hub_metrics(config, roots)))
    return gaps.shown(task)


class _Gaps:
    """The errors of the blocks `noted`, each once."""

    def __init__(self) -> None:
        self.found: dict[str, InputError] = {}

    @contextmanager
    def noted(self) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            self.found.setdefault(str(error), error)

    def shown(self, task: Task) -> list[InputError]:
        """The errors; of those with one remedy the first ones, and the number of the others."""
        alike: dict[str, list[InputError]] = {}
        for error in self.found.values():
            alike.setdefault(error.remedy, []).append(error)
        errors: list[InputError] = []
        for remedy, each in alike.items():
            errors += each[:MOST_ALIKE]
            if (rest := len(each) - MOST_ALIKE) > 0:
                errors.append(InputError(f"task {task.name!r}: {rest} more like these", remedy))
        return errors


def _check_content(task: Task, part: Part, *, only_read: bool) -> None:
    """Raise InputError for local documents that cannot be read, or of which no questions can be made. only_read: make none, as
    for a definition that downloads a metric when it is imported."""
    assert part.splits is not None
    if only_read:
        for name in filter(None, dict.fromkeys([part.scored, part.examples])):
            read_split(part.splits[name])
        return
    from minitron.evaluation.quiet import quiet, usual_random_state  # imports lm-eval

    with quiet(), usual_random_state():
        built = build(task, part)
        scored = documents_of(task, part, part.scored)
        examples = documents_of(task, part, part.examples) if part.examples else None
        with sandboxed_templates():
            check_questions(built, scored, examples, scored_documents(task.limit, len(built.task_docs)))
