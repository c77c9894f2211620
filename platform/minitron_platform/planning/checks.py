"""Checks of a recipe against its teacher, its data and this machine, before any work is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch

from minitron import storage
from minitron.architecture import Architecture
from minitron.checkpoints.tokenizer_files import check_tokenizer_fits
from minitron.data import TextSource, check_chat_template, check_first_row, ends_inside_chats
from minitron.data import source_identity as text_identity
from minitron.device import compute_capability
from minitron.distill.config import ADAMW_8BIT
from minitron.distill.fp8 import check_fp8
from minitron.distill.low_bit import check_low_bit
from minitron.distill.trainable import check_lora
from minitron.errors import InputError, together
from minitron.evaluation import Task, check_tasks, task_gaps
from minitron.evaluation.generation import Sampling, check_prompt
from minitron.models import is_local_source, source_tokenizer
from minitron.tokenizer_beginning import with_beginning
from minitron_platform.estimates.teacher import check_targets
from minitron_platform.recipes.build import all_text_sources, distillation_losses, lm_eval_tasks
from minitron_platform.recipes.consistency import check_consistency, trainings
from minitron_platform.recipes.keys import named_by_key
from minitron_platform.recipes.resources import ResolvedResources
from minitron_platform.recipes.schema import Recipe
from minitron_platform.stages.evaluate import COMPLETION_TOKENS


def check_recipe(recipe: Recipe, teacher: Architecture, max_seq_length: int | None) -> None:
    """Raise InputError for keys that contradict each other or the teacher, and for text and tasks that do not exist.

    max_seq_length: tokens that the teacher accepts; None for any number.
    """
    check_consistency(recipe)
    check_optimizers(recipe)
    check_text(recipe)
    check_benchmark_names(benchmark_tasks(recipe))
    check_with_teacher(recipe, teacher, max_seq_length)
    _check_tokenizer(recipe, teacher, max_seq_length)


def check_text(recipe: Recipe) -> None:
    """Raise InputError or StorageError if the recipe's text does not exist or cannot be read."""
    for key, source in all_text_sources(recipe.data).items():
        check_source_text(key, source)


def check_source_text(key: str, source: TextSource) -> None:
    """Raise InputError or StorageError, naming the recipe key `key`, if a text does not exist or cannot be read."""
    with named_by_key(key):
        text_identity(source)
        check_first_row(source)


def check_with_teacher(recipe: Recipe, teacher: Architecture, max_seq_length: int | None) -> None:
    """Raise InputError for keys that contradict the teacher. max_seq_length: as for `check_recipe`."""
    if recipe.teacher.revision and is_local_source(recipe.teacher.model):
        raise InputError(
            f"teacher.revision: {recipe.teacher.revision} has no effect, because {recipe.teacher.model} is on this machine",
            "leave teacher.revision out",
        )
    _check_seq_length(recipe, max_seq_length)
    if recipe.data.bos is not None:
        with named_by_key("data"):
            with_beginning(source_tokenizer(recipe.teacher.model, recipe.teacher.revision), recipe.data.bos)
    for key, source in all_text_sources(recipe.data).items():
        if source.messages is not None:
            tokenizer = source_tokenizer(recipe.teacher.model, recipe.teacher.revision)
            with named_by_key(key):
                check_chat_template(source, tokenizer)
            if recipe.data.separate_documents is True and ends_inside_chats(tokenizer):
                raise InputError(
                    f"data.separate_documents: true, but the chat template for {key}.messages ends messages with the "
                    "end-of-text token, as documents do: answers would not see their questions",
                    "leave it out, or set it to false",
                )
    if recipe.correct and recipe.correct.method == "lora":
        check_lora(teacher)


def _check_tokenizer(recipe: Recipe, teacher: Architecture, max_seq_length: int | None) -> None:
    """Raise InputError for a tokenizer that cannot be read or is not the teacher's, and for prompts that are too long. A GGUF
    file's takes seconds to read; the stages check it."""
    model = recipe.teacher.model
    if model.endswith(".gguf"):
        return
    with named_by_key("teacher.model"):
        tokenizer = source_tokenizer(model, recipe.teacher.revision)
        check_tokenizer_fits(tokenizer, teacher.vocab_size, model)
    for index, prompt in enumerate(recipe.evaluate.prompts):
        with named_by_key(f"evaluate.prompts.{index}"):
            check_prompt(tokenizer, prompt, Sampling(COMPLETION_TOKENS), max_seq_length, add_bos=recipe.data.bos)


def check_outcomes(recipe: Recipe, teacher: Architecture, candidates: Mapping[str, list[Architecture]]) -> None:
    """Raise InputError for settings that would only fail after the search, with one of its possible winners.

    candidates: by model of the family.
    """
    check_targets(recipe, teacher, candidates)
    if recipe.losses.top_k > teacher.vocab_size:
        raise InputError(
            f"losses.top_k: {recipe.losses.top_k} is more than the vocabulary of {teacher.vocab_size} tokens",
            f"use at most {teacher.vocab_size}",
        )
    for depth in sorted({shape.num_layers for shapes in candidates.values() for shape in shapes}):
        distillation_losses(recipe, replace(teacher, num_layers=depth), teacher)


def check_optimizers(recipe: Recipe) -> None:
    """Raise InputError for an optimizer whose package is not installed."""
    for key, training in trainings(recipe).items():
        if training.optimizer == ADAMW_8BIT:
            with named_by_key(key):
                check_low_bit()


def check_fp8_trainings(recipe: Recipe, dtype: torch.dtype | None, *, gpus_here: bool) -> list[str]:
    """The keys of trainings with FP8 products. Raises InputError where `minitron.distill.fp8.check_fp8` does; gpus_here: they
    run on this machine's GPUs."""
    keys = [key for key, training in trainings(recipe).items() if training.fp8 != "none"]
    capability = compute_capability() if keys and gpus_here else None
    for key in keys:
        with named_by_key(key):
            check_fp8(dtype, recipe.data.seq_length, capability)
    return [f"{key}.fp8" for key in keys]


def check_machine(resources: ResolvedResources, storage_path: str, *, elsewhere: bool) -> None:
    """Raise InputError for GPUs that this machine does not have, unless trials and workers run `elsewhere`, and StorageError
    for a storage that cannot be written."""
    if not elsewhere:
        _check_gpu_count(resources)
    storage.check_folder_writable(storage_path)


def check_benchmarks(recipe: Recipe, max_seq_length: int | None, finished: Mapping[str, set[str]]) -> None:
    """Raise InputError for benchmarks that lack a package, metric or document, or whose documents make no questions, as long as
    a stage before them has to be done. All that is missing is named at once.

    Once only the evaluation is left, a benchmark that fails costs nothing else: it is reported and tried again.

    finished: names of the finished stages by model of the family.
    """
    # by stage, the tasks that it is too late to correct once the stage has begun
    task_keys = {"calibrate": "calibrate.task", "search": "search.evaluate.tasks", "distill": "evaluate.tasks"}
    unfinished = {
        key
        for stage, key in task_keys.items()
        if any(stage not in finished.get(member.model, ()) for member in recipe.family)
    }
    tasks = [each for each in benchmark_tasks(recipe) if any(each[0].startswith(prefix) for prefix in unfinished)]
    _check_gaps(tasks, max_seq_length)


def _check_gaps(tasks: Iterable[tuple[str, Task]], max_seq_length: int | None) -> None:
    """Raise InputError naming everything that the tasks lack, by their keys in the recipe."""
    gaps: list[InputError] = []
    for key, task in tasks:
        for gap in task_gaps(task, max_seq_length):
            try:
                with named_by_key(key):
                    raise gap
            except InputError as error:
                gaps.append(error)
    if gaps:
        raise together(gaps)


def benchmark_tasks(recipe: Recipe) -> Iterator[tuple[str, Task]]:
    """Every benchmark of the recipe with its key."""
    search_tasks = recipe.search.evaluate.tasks if recipe.search.evaluate else []
    for key, tasks in (("evaluate.tasks", recipe.evaluate.tasks), ("search.evaluate.tasks", search_tasks)):
        with named_by_key(key):
            made = lm_eval_tasks(tasks, recipe.evaluate.allow_code, recipe.evaluate.task_folder)
        yield from ((f"{key}.{index}", task) for index, task in enumerate(made))
    if recipe.calibrate.task:
        yield "calibrate.task", lm_eval_tasks([recipe.calibrate.task])[0]


def check_benchmark_names(tasks: Iterable[tuple[str, Task]]) -> None:
    """Raise InputError for a benchmark that does not exist or cannot run as configured, and for one that is given twice.

    tasks: each with its key in the recipe.
    """
    seen: dict[str, str] = {}
    given = list(tasks)
    try:
        for key, task in given:
            with named_by_key(key):
                check_tasks([task])
    except InputError:
        _check_gaps(given, None)  # names what the others lack, too
        raise
    for key, task in given:
        name = f"{key.rstrip('.0123456789')} {task.name} {task.num_fewshot}"
        if name in seen:
            raise InputError(
                f"{key}: task {task.name!r} is also {seen[name]}",
                "give each task once with the same num_fewshot; scores are kept by both",
            )
        seen[name] = key


def _check_seq_length(recipe: Recipe, max_seq_length: int | None) -> None:
    if max_seq_length is None:
        return
    for member in recipe.family:
        limits = member.limits
        if limits and limits.times_candidates and (limits.context or 0) > max_seq_length:
            raise InputError(
                f"{recipe.key(member)}.limits.context: {limits.context} is more than the {max_seq_length} tokens that the "
                "teacher accepts, so latency cannot be measured",
                f"use at most {max_seq_length}",
            )
    if recipe.data.seq_length > max_seq_length:
        raise InputError(
            f"data.seq_length: {recipe.data.seq_length} is more than the {max_seq_length} tokens that the teacher accepts",
            f"use at most {max_seq_length}",
        )


def _check_gpu_count(resources: ResolvedResources) -> None:
    available = torch.cuda.device_count()
    trial = (resources.least_workers_per_trial or resources.workers_per_trial) * resources.gpus_per_trial
    needed = max(trial, (resources.least_workers or resources.workers) * resources.gpus_per_worker)
    if needed > available:
        raise InputError(
            f"resources: the recipe needs {needed:g} GPUs and this machine has {available}",
            "leave gpus_per_trial, gpus_per_worker and workers out, give --address, or submit to a cluster",
        )
