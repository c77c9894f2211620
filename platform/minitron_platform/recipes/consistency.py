"""Refusal of keys that contradict each other, whatever the teacher and the machine are."""

from __future__ import annotations

from minitron.errors import InputError
from minitron_platform.recipes.build import all_text_sources
from minitron_platform.recipes.schema import Data, HeldoutText, Recipe, Training, WorkerRange
from minitron_platform.recipes.search_schedule import SearchSchedule


def check_consistency(recipe: Recipe) -> None:
    """Raise InputError, naming the key, its value and a remedy, for keys of `recipe` that contradict each other."""
    _check_sampler(recipe)
    _check_row_counts(recipe)
    _check_text(recipe.data)
    for key, training in trainings(recipe).items():
        _check_training(key, training)
        _check_benchmarks_during_training(recipe, key, training)
    _check_search_training(recipe)
    _check_calibration(recipe)
    _check_probe(recipe)
    _check_benchmarks(recipe)
    _check_workers_per_trial(recipe)
    _check_gpu_fractions(recipe)


def trainings(recipe: Recipe) -> dict[str, Training]:
    """Every training that the recipe has a section for, by its key."""
    trainings = {"search.training": recipe.search.training, "distill": recipe.distill}
    trainings |= {f"{recipe.key(member)}.distill": member.distill for member in recipe.family if member.distill}
    if recipe.correct and recipe.correct.training:
        trainings["correct.training"] = recipe.correct.training
    return trainings


def _check_training(key: str, training: Training) -> None:
    if training.min_lr > training.peak_lr:
        raise InputError(f"{key}.min_lr: {training.min_lr} is above peak_lr {training.peak_lr}", "lower min_lr")
    if training.warmup_steps >= training.steps:
        raise InputError(
            f"{key}.warmup_steps: {training.warmup_steps} leaves no step after the warm-up, of {training.steps} in all",
            "use fewer warm-up steps, or more steps",
        )


def _check_benchmarks_during_training(recipe: Recipe, key: str, training: Training) -> None:
    if not training.evaluate_tasks_every:
        return
    reason = ""
    if not recipe.evaluate.tasks:
        reason = "the recipe has no evaluate.tasks"
    if key.startswith(("search", "correct")):
        reason = "benchmarks during a training are only run in the full distillation"
    if reason:
        raise InputError(
            f"{key}.evaluate_tasks_every: {training.evaluate_tasks_every}, but {reason}",
            "leave it out" if recipe.evaluate.tasks else "leave it out, or name evaluate.tasks",
        )
    if training.evaluate_tasks_every > training.steps // 2:
        most = f"at most {training.steps // 2}, or " if training.steps > 1 else ""
        raise InputError(
            f"{key}.evaluate_tasks_every: {training.evaluate_tasks_every} of {key}.steps: {training.steps} leaves fewer than "
            "two measurements, so that there is no change and never an alarm",
            f"{most}leave it out: evaluate.tasks are run after the training in any case",
        )


def _check_search_training(recipe: Recipe) -> None:
    schedule = SearchSchedule(recipe.search)
    halving = schedule.halving
    if halving and not halving.stop_rungs(schedule.rungs, schedule.steps):
        raise InputError(
            f"search.rungs: none of {recipe.search.rungs} is between search.halving.grace = {halving.grace} and the end",
            "add a rung, or shorten the grace period",
        )
    if recipe.search.training.evaluate_every:
        raise InputError(
            f"search.training.evaluate_every: {recipe.search.training.evaluate_every}, but candidates are measured only at "
            "search.rungs and at the end",
            "leave it out; distill.evaluate_every measures the winner during its full distillation",
        )


def _check_calibration(recipe: Recipe) -> None:
    calibrate = recipe.calibrate
    if calibrate.layers == "task" and calibrate.task is None:
        raise InputError("calibrate.task: missing, but calibrate.layers is task", "name the task")
    if calibrate.layers != "task" and calibrate.task is not None:
        raise InputError(
            f"calibrate.task: {calibrate.task.name}, but calibrate.layers is {calibrate.layers}",
            "set calibrate.layers=task, or leave calibrate.task out",
        )
    if calibrate.steps > 1 and calibrate.depth != "contiguous":
        raise InputError(
            f"calibrate.steps: {calibrate.steps} with calibrate.depth: {calibrate.depth}, but pruning in steps removes "
            "contiguous blocks",
            "leave one of the two out",
        )


def _check_probe(recipe: Recipe) -> None:
    correct = recipe.correct
    training = recipe.correction()
    if correct is None or training is None:
        return
    if correct.probe_steps and correct.probe_steps <= training.warmup_steps:
        raise InputError(
            f"correct.probe_steps: {correct.probe_steps} is inside the {training.warmup_steps} warm-up steps",
            "use more steps, or leave it out",
        )


def _check_benchmarks(recipe: Recipe) -> None:
    for key in ("data", "limit"):  # which become those of the tasks
        if getattr(recipe.evaluate, key) is not None:
            raise InputError(
                f"evaluate.{key}: {getattr(recipe.evaluate, key)}, but there are no evaluate.tasks and no evaluate.suite",
                "name a suite or tasks, or leave it out",
            )


def _check_row_counts(recipe: Recipe) -> None:
    data = recipe.data
    heldout_rows = recipe.search.heldout_rows or 0
    for key, rows, available_key, available in (
        ("calibrate.rows", recipe.calibrate.rows, "data.train_rows", data.train_rows),
        ("search.heldout_rows", heldout_rows, "data.heldout_rows", data.heldout_rows),
    ):
        if rows > available:
            raise InputError(f"{key}: {rows} is more than {available_key} = {available}", f"use at most {available}")


def _check_text(data: Data) -> None:
    if not data.sources:
        if data.kind is None:
            raise InputError("data.kind: missing", "name the kind of text, or several texts as data.sources")
    else:
        given = [
            name for name in (*HeldoutText.model_fields,) if getattr(data, name) != Data.model_fields[name].default
        ]
        if given:
            raise InputError(f"data.{given[0]}: given beside data.sources", "move it into the entries of data.sources")
    if data.heldout and data.heldout_fraction is not None:
        raise InputError(
            f"data.heldout_fraction: {data.heldout_fraction}, but data.heldout names the held-out text",
            "leave one of them out",
        )
    all_text_sources(data)


def _check_sampler(recipe: Recipe) -> None:
    sampler = recipe.search.sampler
    forward = recipe.search.forward
    if sampler is None:
        return
    if forward is None:
        raise InputError(
            "search.sampler: needs search.forward, whose scores it samples by",
            "add search.forward: {keep: ...}, the number of candidates to distil",
        )
    if forward.keep > sampler.candidates:
        raise InputError(
            f"search.forward.keep: {forward.keep} is more than search.sampler.candidates = {sampler.candidates}",
            "keep fewer, or sample more",
        )
    for member in recipe.family:
        if len(member.points) > sampler.candidates:
            raise InputError(
                f"{recipe.key(member)}.points: {len(member.points)} points are more than search.sampler.candidates = "
                f"{sampler.candidates}",
                "sample at least as many candidates as there are points",
            )


def _check_workers_per_trial(recipe: Recipe) -> None:
    given = recipe.resources.workers_per_trial
    workers = given.max if isinstance(given, WorkerRange) else given
    rows = recipe.search.training.batch_rows
    if workers > rows:
        raise InputError(
            f"resources.workers_per_trial: {workers} is more than search.training.batch_rows = {rows}",
            f"use at most {rows}",
        )


def _check_gpu_fractions(recipe: Recipe) -> None:
    resources = recipe.resources
    for gpus_key, gpus, workers_key, workers in (
        ("gpus_per_trial", resources.gpus_per_trial, "workers_per_trial", resources.workers_per_trial),
        ("gpus_per_worker", resources.gpus_per_worker, "workers", resources.workers),
    ):
        if gpus == "auto" or gpus % 1 == 0:
            continue
        if gpus > 1:
            raise InputError(
                f"resources.{gpus_key}: {gpus:g} is not a whole number of GPUs",
                "use a whole number, or a fraction below 1 for processes that share a GPU",
            )
        most = workers.max if isinstance(workers, WorkerRange) else workers
        if most != "auto" and most > 1:
            raise InputError(
                f"resources.{gpus_key}: {gpus:g} with resources.{workers_key}: {most}, but NCCL does not let workers that "
                "train together share a GPU",
                f"use resources.{gpus_key}=1, or resources.{workers_key}=1",
            )
