"""Search: every candidate in the budget gets a short distillation on Ray Tune; the best held-out KL wins."""

from __future__ import annotations

import json
from typing import Any

from minitron import storage
from minitron.architecture import Architecture
from minitron.errors import InputError
from minitron_platform.context import Context
from minitron_platform.recipe import Recipe
from minitron_platform.stages.targets import materials
from minitron_platform.training import distill_config
from minitron_search.space import candidates
from minitron_search.trial import SearchTask, trial_key, trial_result

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


def memory_per_trial(teacher: Architecture, found: list[Architecture]) -> int:
    """Bytes of main memory that a trial on CPUs takes at its peak, about: libraries, the teacher while the student is cut,
    the student's weights, master weights, gradients and moments, and a chunk of logits for both."""
    student = 24 * max(a.num_parameters for a in found)
    return (
        1_200_000_000 + max(4 * teacher.num_parameters, 8 * teacher.vocab_size * (512 + teacher.hidden_size)) + student
    )


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
        folder=storage.join(folder, "trials"),
        heldout_rows=recipe.search.heldout_rows,
        threads=max(1, int(recipe.resources.cpus_per_trial)),
    )
    context.console.status("starting Ray")
    context.need_ray()
    view = _View(context, found)
    result = search(
        task,
        found,
        cpus_per_trial=recipe.resources.cpus_per_trial,
        gpus_per_trial=recipe.resources.gpus_per_trial,
        memory_per_trial=memory_per_trial(teacher, found),
        max_failures=recipe.resources.max_failures,
        on_event=view.event,
    )
    ranking = json.loads(result.ranking.to_json(orient="records"))
    _record_trials(context, task, found)
    best = result.ranking.iloc[0]
    return {
        "winner": result.winner.to_dict(),
        "ranking": ranking,
        "failures": result.failures,
        "candidates": len(found),
        "trials": task.folder,
        "summary": f"{len(ranking)} of {len(found)} candidates distilled · winner {result.winner} · KL {best['kl']:.3f}",
    }


def _record_trials(context: Context, task: SearchTask, found: list[Architecture]) -> None:
    """Close each trial's record; one that finished in an earlier, killed process is recorded from its result."""
    for architecture in found:
        log = context.log(f"trial-{trial_key(architecture)}")
        result = trial_result(task.folder, architecture)
        if result is None:
            log.start(str(architecture), parent=f"{context.run_key}.search", tags={"minitron.kind": "trial"})
            log.end("FAILED")
            continue
        log.start(str(architecture), parent=f"{context.run_key}.search", tags={"minitron.kind": "trial"})
        shape = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads")
        log.params({name: result["architecture"][name] for name in shape} | {"parameters": result["parameters"]})
        log.metrics(
            {
                "heldout_kl": result["kl"],
                "heldout_loss": result["loss"],
                "top1_agreement": result["top1_agreement"],
                "heldout_kl_undistilled": result["kl_undistilled"],
                "tokens": result["tokens"],
            },
            step=task.config.steps,
        )
        log.end("FINISHED")


class _View:
    """Turns trial reports into the live line, a line per finished trial, and metrics."""

    def __init__(self, context: Context, found: list[Architecture]) -> None:
        self.context, self.console = context, context.console
        self.names = {trial_key(a): str(a) for a in found}
        self.latest: dict[str, dict[str, Any]] = {}
        self.first_kl: dict[str, float] = {}
        self.finished = 0
        self.console.status(self._status)

    def event(self, key: str, numbers: dict[str, Any]) -> None:
        log = self.context.log(f"trial-{key}")
        if key not in self.latest:
            log.start(self.names[key], parent=f"{self.context.run_key}.search", tags={"minitron.kind": "trial"})
        if "train_kl" in numbers:
            wanted = ("train_kl", "learning_rate", "grad_norm", "tokens_per_second")
            log.metrics({k: numbers[k] for k in wanted if k in numbers}, step=int(numbers["step"]))
        self.latest[key] = numbers
        if "failed" in numbers:
            self.console.say(f"  [yellow]failed[/]  {self.names[key]}: {numbers['failed']}")
            log.tags({"minitron.failure": numbers["failed"]})
            self.latest[key] = {}
            return
        if "kl" not in numbers:
            return
        if numbers["step"] == 0:
            self.first_kl[key] = numbers["kl"]
            return
        self.finished += 1
        self.latest[key] = {}
        before = f"{self.first_kl[key]:.2f} → " if key in self.first_kl else ""
        self.console.say(
            f"  {self.finished}/{len(self.names)}  {self.names[key]}  held-out KL {before}{numbers['kl']:.3f}"
        )

    def _status(self) -> str:
        active = [
            f"{self.names[key].split(' · ', 1)[0]}…{numbers['step']}/{numbers['steps']}"
            + (f" KL {numbers['train_kl']:.2f}" if "train_kl" in numbers else "")
            for key, numbers in self.latest.items()
            if "steps" in numbers
        ]
        return f"{self.finished}/{len(self.names)} candidates · " + (" · ".join(active) or "starting workers")
