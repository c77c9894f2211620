"""What cannot work is refused before anything is done, by key and with the remedy: one function for each thing looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from uuid import uuid4

import torch

from minitron import storage
from minitron.architecture import Architecture
from minitron.data import document_tokens as tokenizer_document_tokens
from minitron.data import source_identity as text_identity
from minitron.distill.trainable import check_lora
from minitron.errors import InputError, prefixed
from minitron.evaluation import Task, check_requirements, check_tasks
from minitron.models import source_tokenizer
from minitron_platform.cluster.room import joins_cluster
from minitron_platform.estimates.teacher import check_targets
from minitron_platform.recipes.build import distillation_losses, document_tokens, lm_eval_tasks, text_source
from minitron_platform.recipes.resources import ResolvedResources
from minitron_platform.recipes.schema import Recipe
from minitron_platform.recipes.search_schedule import SearchSchedule


def check_recipe(recipe: Recipe, resources: ResolvedResources, teacher: Architecture, longest: int | None) -> None:
    """Raise InputError for keys that contradict each other or a `teacher` that takes `longest` tokens (None: any number), and
    for text and tasks that are not there."""
    _check_context(recipe, longest)
    check_keys(recipe)
    with prefixed("data."):
        text_identity(text_source(recipe.data))
    if recipe.data.bos:
        tokenizer = source_tokenizer(recipe.teacher.model, recipe.teacher.revision)
        document_tokens(recipe.data, tokenizer_document_tokens(tokenizer))
    _check_tasks(recipe)
    _check_trials(recipe, resources)
    _check_correction(recipe, teacher)


def check_keys(recipe: Recipe) -> None:
    """Raise InputError for keys that contradict each other whatever the teacher and the machine are."""
    _check_search(recipe)
    _check_rows(recipe)
    _check_training(recipe)


def check_outcomes(recipe: Recipe, teacher: Architecture, found: dict[str, list[Architecture]]) -> None:
    """Raise InputError for what would fail with some winner, after the whole search; `found` are each model's candidates."""
    check_targets(recipe, teacher, found)
    _check_losses(recipe, teacher, found)


def check_machine(resources: ResolvedResources, storage_path: str, address: str | None) -> None:
    """Raise InputError for GPUs that are not here, unless the run goes elsewhere, and StorageError for a place that cannot be
    written."""
    if not joins_cluster(address):
        _check_gpus(resources)
    probe = storage.join(storage_path, f".writable-{uuid4().hex}")  # its own: others may check the same storage now
    storage.write_bytes(probe, b"")
    storage.remove(probe)


def check_benchmarks(recipe: Recipe, longest: int | None, done: Mapping[str, set[str]]) -> None:
    """Raise InputError for packages, metrics and documents that a benchmark lacks, while there is work that they could make
    worthless; `done` are each model's finished stages. Where only the evaluation is left, one that fails costs nothing."""
    needed = {"calibrate": "calibrate.task", "search": "search.evaluate.tasks", "distill": "evaluate.tasks"}
    waiting = {key for stage, key in needed.items() if any(stage not in done.get(m.model, ()) for m in recipe.family)}
    for key, task in _tasks(recipe):
        if any(key.startswith(prefix) for prefix in waiting):
            with prefixed(f"{key}: "):
                check_requirements(task, longest)


def _tasks(recipe: Recipe) -> Iterator[tuple[str, Task]]:
    """Every task with its key in the recipe."""
    of_search = recipe.search.evaluate.tasks if recipe.search.evaluate else []
    for where, asked in (("evaluate.tasks", recipe.evaluate.tasks), ("search.evaluate.tasks", of_search)):
        yield from ((f"{where}[{index}]", task) for index, task in enumerate(lm_eval_tasks(asked)))
    if recipe.calibrate.task:
        yield "calibrate.task", lm_eval_tasks([recipe.calibrate.task])[0]


def _check_tasks(recipe: Recipe) -> None:
    seen: dict[str, str] = {}
    for key, task in _tasks(recipe):
        with prefixed(f"{key}: "):
            check_tasks([task])
        if (name := f"{key.split('[')[0]} {task.name}") in seen:
            raise InputError(
                f"{key}: task {task.name!r} is {seen[name]} too", "give each task once; scores are kept by name"
            )
        seen[name] = key


def _check_training(recipe: Recipe) -> None:
    trainings = {"search.training": recipe.search.training, "distill": recipe.distill}
    trainings |= {f"{recipe.key(m)}.distill": m.distill for m in recipe.family if m.distill}
    if correction := recipe.correction():
        trainings["correct.training"] = correction
    for key, training in trainings.items():
        if training.min_lr > training.peak_lr:
            raise InputError(f"{key}.min_lr: {training.min_lr} is above peak_lr {training.peak_lr}", "lower min_lr")
        if training.warmup_steps >= training.steps:
            raise InputError(
                f"{key}.warmup_steps: {training.warmup_steps} leaves nothing of {training.steps} steps",
                "use fewer warm-up steps, or more steps",
            )
    schedule = SearchSchedule(recipe.search)
    rule = schedule.halving
    if rule and not rule.stop_rungs(schedule.rungs, schedule.steps):
        raise InputError(
            f"search.rungs: {recipe.search.rungs} has none between search.halving.grace = {rule.grace} and the end",
            "add a rung, or shorten the grace period",
        )
    if recipe.search.training.evaluate_every:
        raise InputError(
            f"search.training.evaluate_every: {recipe.search.training.evaluate_every}, and candidates are measured once",
            "leave it out; distill.evaluate_every is there for the winner",
        )
    for key, training in trainings.items():
        where = "the recipe has no evaluate.tasks" if not recipe.evaluate.tasks else ""
        if key.startswith(("search", "correct")):
            where = "tasks are for students in their full distillation"
        if training.evaluate_tasks_every and where:
            raise InputError(
                f"{key}.evaluate_tasks_every: {training.evaluate_tasks_every}, and {where}",
                "leave it out" if recipe.evaluate.tasks else "leave it out, or name evaluate.tasks",
            )
    if (recipe.calibrate.layers == "task") != (recipe.calibrate.task is not None):
        raise InputError(
            f"calibrate.task: {recipe.calibrate.task} with calibrate.layers: {recipe.calibrate.layers}",
            "give a task with `layers: task`, and only then",
        )
    if recipe.calibrate.steps > 1 and recipe.calibrate.depth != "contiguous":
        raise InputError(
            f"calibrate.steps: {recipe.calibrate.steps} with calibrate.depth: {recipe.calibrate.depth}",
            "steps remove contiguous blocks: leave one of the two out",
        )


def _check_trials(recipe: Recipe, resources: ResolvedResources) -> None:
    rows = recipe.search.training.batch_rows
    if resources.workers_per_trial > rows:
        raise InputError(
            f"resources.workers_per_trial: {resources.workers_per_trial} is more than search.training.batch_rows = {rows}",
            f"use at most {rows}",
        )
    if resources.workers_per_trial > 1 and resources.gpus_per_trial % 1:
        raise InputError(
            f"resources.gpus_per_trial: {resources.gpus_per_trial:g} with {resources.workers_per_trial} workers_per_trial, "
            "which cannot share a GPU",
            "use 1, or one worker per trial",
        )


def _check_correction(recipe: Recipe, teacher: Architecture) -> None:
    asked, training = recipe.correct, recipe.correction()
    if asked is None or training is None:
        return
    if asked.probe_steps and asked.probe_steps <= training.warmup_steps:
        raise InputError(
            f"correct.probe_steps: {asked.probe_steps} is inside the {training.warmup_steps} warm-up steps",
            "look later, or leave it out",
        )
    if asked.method == "lora":
        check_lora(teacher)


def _check_losses(recipe: Recipe, teacher: Architecture, found: dict[str, list[Architecture]]) -> None:
    if recipe.losses.top_k > teacher.vocab_size:
        raise InputError(
            f"losses.top_k: {recipe.losses.top_k} of {teacher.vocab_size} tokens", f"use at most {teacher.vocab_size}"
        )
    for depth in sorted({shape.num_layers for shapes in found.values() for shape in shapes}):
        distillation_losses(recipe, replace(teacher, num_layers=depth), teacher)


def _check_rows(recipe: Recipe) -> None:
    data = recipe.data
    for key, asked, split, there in (
        ("calibrate.rows", recipe.calibrate.rows, "data.train_rows", data.train_rows),
        ("search.heldout_rows", recipe.search.heldout_rows or 0, "data.heldout_rows", data.heldout_rows),
    ):
        if asked > there:
            raise InputError(f"{key}: {asked} is more than {split} = {there}", f"use at most {there}")


def _check_search(recipe: Recipe) -> None:
    search = recipe.search
    if search.sampler and not search.forward:
        raise InputError(
            "search.sampler: there is no search.forward, by whose scores it samples",
            "add search.forward: {keep: ...}, how many of them to distil",
        )
    if search.sampler and search.forward and search.forward.keep > search.sampler.candidates:
        raise InputError(
            f"search.forward.keep: {search.forward.keep} of {search.sampler.candidates} search.sampler.candidates",
            "keep fewer, or sample more",
        )
    for member in recipe.family:
        if search.sampler and len(member.points) > search.sampler.candidates:
            raise InputError(
                f"{recipe.key(member)}.points: {len(member.points)}, and search.sampler.candidates is "
                f"{search.sampler.candidates}",
                "sample at least as many as there are points",
            )


def _check_context(recipe: Recipe, longest: int | None) -> None:
    for member in recipe.family:
        limits = member.limits
        if limits and limits.latency_ms and longest is not None and (limits.context or 0) > longest:
            raise InputError(
                f"{recipe.key(member)}.limits.context: {limits.context} is more than the {longest} tokens that the "
                "teacher takes, so that no latency can be measured",
                f"use at most {longest}",
            )
    if longest is not None and recipe.data.seq_length > longest:
        raise InputError(
            f"data.seq_length: {recipe.data.seq_length} is more than the {longest} tokens that the teacher takes",
            f"use at most {longest}",
        )


def _check_gpus(resources: ResolvedResources) -> None:
    there = torch.cuda.device_count()
    trial = resources.workers_per_trial * resources.gpus_per_trial
    wanted = max(trial, resources.workers * resources.gpus_per_worker)
    if wanted > there:
        raise InputError(
            f"resources: {wanted:g} GPUs are asked for and this machine has {there}",
            "leave gpus_per_trial, gpus_per_worker and workers out, give --address, or submit to a cluster",
        )
