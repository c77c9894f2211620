"""Checks of a recipe before it is submitted to a cluster, as far as the submitting machine can make them."""

from __future__ import annotations

from dataclasses import replace
from glob import glob

from huggingface_hub.errors import HTTPError

from minitron import storage
from minitron.architecture import Architecture
from minitron.data import TextSource
from minitron.errors import InputError, StorageError
from minitron.models import check_contents, check_source, source_architecture
from minitron.packages import PACKAGE, package_path
from minitron_platform.planning.checks import (
    benchmark_tasks,
    check_benchmark_names,
    check_outcomes,
    check_source_text,
    check_with_teacher,
)
from minitron_platform.recipes.build import all_text_sources
from minitron_platform.recipes.candidates import family_candidates
from minitron_platform.recipes.consistency import check_consistency
from minitron_platform.recipes.keys import named_by_key
from minitron_platform.recipes.schema import Recipe


def check_submission(recipe: Recipe) -> list[str]:
    """Raise what `plan` raises for a recipe that works on no machine.

    Returns the keys, with their values, that cannot be checked here: a teacher, text or benchmark documents that this machine
    cannot read, but the cluster may. A relative path must exist here, because a job has a working directory of its own.
    """
    check_consistency(recipe)
    return [*_check_benchmarks(recipe), *_check_text(recipe), *_check_teacher(recipe)]


def _check_benchmarks(recipe: Recipe) -> list[str]:
    unchecked = []
    tasks = []
    for key, task in benchmark_tasks(recipe):
        if task.data is None or _exists_here(f"{key}.data", task.data):
            tasks.append((key, task))
        else:
            tasks.append(
                (key, replace(task, data=None, num_fewshot=0))
            )  # without the documents, only the name is checked
            unchecked.append(f"{key}.data: {task.data}")
    check_benchmark_names(tasks)
    return unchecked


def _check_text(recipe: Recipe) -> list[str]:
    return [
        f"{key}.path: {source.path}"
        for key, source in all_text_sources(recipe.data).items()
        if not _is_text_checked(f"{key}.path", key, source)
    ]


def _is_text_checked(path_key: str, key: str, source: TextSource) -> bool:
    """Whether a text could be checked here. Raises InputError or StorageError for one that is here, but cannot be read."""
    if not storage.is_local(source.path):
        return False  # the credentials may only be on the cluster
    if source.kind == "hub":
        try:
            check_source_text(key, source)
        except (InputError, StorageError) as error:
            if not _is_unreachable(error):
                raise
            return False
        return True
    if source.path and not _exists_here(path_key, source.path):
        return False
    check_source_text(key, source)
    return True


def _check_teacher(recipe: Recipe) -> list[str]:
    model = recipe.teacher.model
    with named_by_key("teacher.model"):
        teacher = _read_teacher(recipe)
    if teacher is None:
        return [f"teacher.model: {model}"]
    architecture, max_seq_length = teacher
    check_with_teacher(recipe, architecture, max_seq_length)
    family = family_candidates(recipe, architecture)
    check_outcomes(recipe, architecture, {model: allowed.architectures for model, allowed in family.items()})
    return []


def _read_teacher(recipe: Recipe) -> tuple[Architecture, int | None] | None:
    """The teacher's architecture and maximum sequence length; None if this machine cannot read the teacher."""
    model = recipe.teacher.model
    revision = recipe.teacher.revision
    try:
        check_source(model)
    except InputError:
        if _exists_here("", model):
            raise
        return None
    try:
        teacher = source_architecture(model, revision)
        check_contents(model, revision)
    except InputError as error:
        if storage.local_path(model).exists() or not _is_unreachable(error):
            raise
        return None
    return teacher


def _exists_here(key: str, path: str) -> bool:
    """Whether a local path, glob or packaged file exists on this machine.

    Raises InputError for a relative path that does not exist.
    """
    if path.startswith(PACKAGE):
        try:
            return package_path(path).exists()
        except InputError:
            return False
    if glob(str(storage.local_path(path)), recursive=True):
        return True
    if not path.startswith(("/", "~", "file://", "local://")):
        name = f"{key}: {path}" if key else path
        raise InputError(
            f"{name} does not exist on this machine",
            "check the path, or give the absolute path that it has on the cluster",
        )
    return False


def _is_unreachable(error: InputError | StorageError) -> bool:
    """Whether an error was raised because the hub cannot be reached from here, or does not give access."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError | HTTPError):
            return True
        cause = cause.__cause__
    return False
