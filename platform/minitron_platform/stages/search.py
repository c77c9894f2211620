"""Search: every candidate in the budget gets a short distillation on Ray Tune; the best held-out KL wins."""

from __future__ import annotations

import json
from typing import Any

from minitron import storage
from minitron.architecture import Architecture
from minitron.errors import InputError
from minitron_platform.context import Context
from minitron_platform.locks import lock
from minitron_platform.recipe import Recipe
from minitron_platform.stages.targets import materials
from minitron_platform.training import distill_config
from minitron_platform.trials import TrialsView, record_trials
from minitron_search.space import candidates
from minitron_search.trial import SearchTask

VERSION = 1


def architectures(recipe: Recipe, teacher: Architecture) -> list[Architecture]:
    """The candidates of a recipe. Raises InputError when the target cannot be met from its space."""
    target = recipe.target
    if target.parameters >= teacher.num_parameters:
        raise InputError(
            f"target.parameters: {target.parameters:,} is not smaller than the teacher's {teacher.num_parameters:,}",
            "choose a smaller target, or a larger teacher",
        )
    low, high = target.parameters * (1 - target.tolerance), target.parameters * (1 + target.tolerance)
    found = candidates(teacher, recipe.search.space, low, high)
    if not found:
        everything = candidates(teacher, recipe.search.space, 0, float("inf"))
        nearest = min(everything, key=lambda a: abs(a.num_parameters - target.parameters), default=None)
        near = f"; the nearest has {nearest.num_parameters:,} ({nearest})" if nearest else ""
        raise InputError(
            f"search.space: no combination has {low:,.0f} to {high:,.0f} parameters{near}",
            "widen search.space or target.tolerance",
        )
    return found


def trials_folder(context: Context) -> str:
    """Where trials are kept: not under the search, so that a space with more widths finds those of the narrower one."""
    rest = {name: value for name, value in inputs(context).items() if name not in ("space", "target")}
    return storage.join(context.places.storage, "trials", storage.fingerprint({**rest, "version": VERSION}))


def memory_per_trial(recipe: Recipe, teacher: Architecture, found: list[Architecture]) -> int:
    """Bytes of main memory to ask Ray for, for each trial on CPUs; 0 for trials on GPUs, which need the GPU's instead.

    Libraries, the teacher while the student is cut, and the student's weights, master weights, gradients and moments.
    No more than the largest node offers: one trial at a time always runs.
    """
    import ray

    if recipe.resources.gpus_per_trial:
        return 0
    logits = 8 * teacher.vocab_size * (512 + teacher.hidden_size)
    wanted = 1_200_000_000 + max(4 * teacher.num_parameters, logits) + 24 * max(a.num_parameters for a in found)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    largest = max(n.get("memory", 0) for n in nodes if n.get("CPU", 0) >= recipe.resources.cpus_per_trial)
    return int(min(wanted, largest))


def inputs(context: Context) -> dict[str, Any]:
    search = context.recipe.search
    return {
        "targets": context.done["targets"]["fingerprint"],
        "scores": context.done["calibrate"]["id"],
        "heldout": [context.done["data"]["heldout"], search.heldout_rows],
        "space": search.space,
        "target": context.recipe.target.model_dump(),
        # how often to checkpoint changes nothing about the result
        "training": search.training.model_dump(exclude={"checkpoint_every"}),
    }


def run(context: Context, folder: str) -> dict[str, Any]:
    from minitron_search.tuning import search

    recipe = context.recipe
    teacher = Architecture.from_dict(context.done["teacher"]["architecture"])
    found = architectures(recipe, teacher)
    task = SearchTask(
        materials=materials(context),
        config=distill_config(recipe.search.training),
        folder=trials_folder(context),
        heldout_rows=recipe.search.heldout_rows,
        threads=max(1, int(recipe.resources.cpus_per_trial)),
    )
    context.console.status("starting Ray")
    context.need_ray()
    view = TrialsView(context, task.folder, found)
    with lock(context.places, f"locks/trials-{task.folder.rsplit('/', 1)[-1]}", "a search over the same trials"):
        result = search(
            task,
            found,
            scratch=storage.join(folder, "tune"),
            cpus_per_trial=recipe.resources.cpus_per_trial,
            gpus_per_trial=recipe.resources.gpus_per_trial,
            memory_per_trial=memory_per_trial(recipe, teacher, found),
            max_failures=recipe.resources.max_failures,
            on_event=view.event,
        )
    ranking = json.loads(result.ranking.to_json(orient="records"))
    best = result.ranking.iloc[0]
    return {
        "winner": result.winner.to_dict(),
        "ranking": ranking,
        "failures": result.failures,
        "candidates": len(found),
        "architectures": [a.to_dict() for a in found],
        "trials": task.folder,
        "summary": f"{len(ranking)} of {len(found)} candidates distilled · winner {result.winner} · KL {best['kl']:.3f}",
    }


def record(context: Context, outputs: dict[str, Any]) -> None:
    """Write every trial's result into its record, whichever run and process computed it."""
    found = [Architecture.from_dict(values) for values in outputs["architectures"]]
    record_trials(context, outputs["trials"], found)
