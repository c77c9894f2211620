"""Task definitions in a folder of the user's: what they may refer to.

A definition is data. It may include files of its own folder and of lm-eval's package, and name Python functions of either;
those of its own folder run only if that is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minitron.errors import InputError
from minitron.evaluation.definition_files import check_file
from minitron.evaluation.documents import locate
from minitron.evaluation.task_index import OWN, Index, index, stock, tasks_folder


def allowed_roots(folder: str | None) -> tuple[Path, ...]:
    """Folders that definitions may refer to: lm-eval's, ours, and the user's if there is one."""
    own = () if folder is None else (locate(folder).resolve(),)
    return (tasks_folder(), OWN, *own)


def with_folder(folder: str) -> Index:
    """lm-eval's definitions and those in a user's folder.

    Raises InputError if the folder does not exist or has no definitions, and for names that lm-eval has too.
    """
    path = locate(folder)
    own, known = index(path.resolve()) if path.is_dir() else Index(), stock()
    if not own.tasks and not own.groups:
        raise InputError(f"{folder}: has no task definitions", "give the folder with the .yaml files of your tasks")
    for name in (*own.tasks, *own.groups):
        if name in known.tasks or name in known.groups or name in known.tags:
            raise InputError(f"{folder}: its task {name!r} is also one of lm-eval's", "give it another name")
    tags = {tag: (*known.tags.get(tag, ()), *names) for tag, names in own.tags.items()}
    return Index(known.tasks | own.tasks, known.groups | own.groups, known.tags | tags)


def check_includes(task: str, definition: Path, roots: Sequence[Path]) -> None:
    """Raise InputError for a definition that includes a file outside of `roots`, or itself, and as `check_file` does."""
    from lm_eval.tasks._yaml_loader import load_yaml

    pending, seen = [definition.resolve()], set[Path]()
    while pending:
        file = pending.pop()
        if not any(file.is_relative_to(root) for root in roots):
            raise InputError(
                f"task {task!r}: its definition includes {file}, which is outside its folder", "copy it into the folder"
            )
        if not file.is_file():
            raise InputError(f"task {task!r}: its definition includes {file}, which does not exist", "correct the name")
        if file in seen:
            raise InputError(f"task {task!r}: its definition includes {file} twice", "include it once")
        seen.add(file)
        check_file(task, file)
        included = load_yaml(file, resolve_func=False, recursive=False).get("include") or []
        pending += [
            (file.parent / str(each)).resolve() for each in (included if isinstance(included, list) else [included])
        ]
