"""Search: every candidate in the budget gets a short distillation on Ray Tune; the best held-out KL wins."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from minitron import storage
from minitron.architecture import Architecture
from minitron.device import DTYPES
from minitron.errors import InputError
from minitron_platform.recipes.losses import logit_losses
from minitron_platform.recipes.resources import ResolvedResources
from minitron_platform.recipes.schema import Member, Recipe
from minitron_platform.stages.context import Context
from minitron_platform.stages.targets import materials, origin
from minitron_platform.stages.trial_records import TrialsView, record_trials
from minitron_platform.training.ray_train import distill_config
from minitron_search.halving import Halving, kept, planned_steps, rung_steps
from minitron_search.limits import Limits
from minitron_search.room import RESERVED_BYTES
from minitron_search.sampling import Space, draw
from minitron_search.space import candidates, combinations, points_in
from minitron_search.trial import SearchTask

if TYPE_CHECKING:
    import pandas as pd

    from minitron_search.benchmarks import Benchmarks
    from minitron_search.ranking import SearchResult

VERSION = 3
# Inputs that say which candidates there are and how far each goes, but change no trial.
_WHICH = (
    "space",
    "points",
    "limits",
    "parameters",
    "tolerance",
    "rungs",
    "sampler",
    "forward",
    "halving",
    "benchmarks",
)
ENUMERABLE = 50_000  # combinations, about a second's


def architectures(recipe: Recipe, member: Member, base: Architecture) -> list[Architecture]:
    """The candidates for one of the family, cut from `base`, its points first.

    What follows another model of the family may name larger values in its space or points than that one has; they are left
    out. Where the space is to be sampled they are as many as are to be scored, drawn at random; the search itself goes by
    the scores. Raises InputError when its size cannot be met from its space, or the space is too large to enumerate.
    """
    where = place(recipe, member)
    if member.parameters >= base.num_parameters:
        what = "the teacher's" if member.start == "teacher" else "those of the model it is cut from,"
        raise InputError(
            f"{where}.parameters: {member.parameters:,} is not smaller than {what} {base.num_parameters:,}",
            "choose a smaller target, or a larger teacher",
        )
    space = _axes(member, base)
    low, high = budget(member)
    limits = limits_of(recipe, member)
    points = pinned(recipe, member, base)
    if sampled := sampled_space(recipe, member, base):
        assert recipe.search.sampler is not None
        wanted = max(0, recipe.search.sampler.candidates - len(points))
        drawn = [*points, *draw(sampled, wanted, recipe.search.sampler.seed, set(points))]
        if not drawn:
            raise InputError(
                f"{where}.space: 100,000 of {combinations(space):,} combinations drawn at random, and none has "
                f"{low:,.0f} to {high:,.0f} parameters{' within its limits' if limits else ''}",
                f"widen {where}.tolerance, raise {where}.limits, or change {where}.space",
            )
        return drawn
    found = candidates(base, space, low, high, limits=limits, points=points, key=f"{where}.space")
    if not found:
        sized = candidates(base, space, low, high, key=f"{where}.space")
        if sized and limits:
            over = limits.unreachable(sized) or "no combination keeps to all of them at once"
            raise InputError(
                f"{where}.limits: none of {len(sized)} combinations with {low:,.0f} to {high:,.0f} parameters keeps to "
                f"them: {over}",
                f"raise {where}.limits, or widen {where}.space",
            )
        everything = candidates(base, space, 0, float("inf"), key=f"{where}.space")
        nearest = min(everything, key=lambda a: abs(a.num_parameters - member.parameters), default=None)
        near = f"; the nearest has {nearest.num_parameters:,} ({nearest})" if nearest else ""
        inside = f" inside {base}" if member.start == "previous" else ""
        raise InputError(
            f"{where}.space: no combination{inside} has {low:,.0f} to {high:,.0f} parameters{near}",
            f"widen {where}.space or {where}.tolerance",
        )
    return found


def sampled_space(recipe: Recipe, member: Member, base: Architecture) -> Space | None:
    """The space to sample from; None where all of its architectures are candidates, as they are where they are no more than
    the sampler would score. Raises InputError where they are too many to enumerate and there is no sampler."""
    axes, sampler, where = _axes(member, base), recipe.search.sampler, f"{place(recipe, member)}.space"
    count, (low, high), limits = combinations(axes), budget(member), limits_of(recipe, member)
    if sampler is None and count > ENUMERABLE:
        raise InputError(
            f"{where}: {count:,} combinations are too many to look at each (up to {ENUMERABLE:,})",
            "add search.sampler, such as {candidates: 500}, with search.forward, or shorten the axes",
        )
    if sampler is None:
        return None
    if count <= ENUMERABLE:
        points = pinned(recipe, member, base)
        all_of_them = candidates(base, axes, low, high, limits=limits, points=points, key=where)
        if len(all_of_them) <= sampler.candidates:
            return None
    return Space(base, axes, low, high, limits, where)


def _axes(member: Member, base: Architecture) -> dict[str, list[int | float]]:
    """The space, for what follows another model without what is larger than that one."""
    if member.start != "previous":
        return member.space
    fitting = {axis: [v for v in values if v <= getattr(base, axis, v)] for axis, values in member.space.items()}
    return {
        axis: values or member.space[axis] for axis, values in fitting.items()
    }  # if none fits, it is refused by name


def pinned(recipe: Recipe, member: Member, base: Architecture) -> list[Architecture]:
    """The shapes that the recipe names for one of the family; those that do not fit the model before it are left out."""
    return points_in(
        base,
        member.points,
        *budget(member),
        limits=limits_of(recipe, member),
        key=f"{place(recipe, member)}.points",
        skip=member.start == "previous",
    )


def budget(member: Member) -> tuple[float, float]:
    """Fewest and most parameters."""
    return member.parameters * (1 - member.tolerance), member.parameters * (1 + member.tolerance)


def limits_of(recipe: Recipe, member: Member) -> Limits | None:
    """What a candidate may need at most, if anything is limited."""
    if member.limits is None:
        return None
    return Limits(**{**member.limits.model_dump(), "context": member.limits.context or recipe.data.seq_length})


def place(recipe: Recipe, member: Member) -> str:
    """A model's key in the recipe."""
    return f"family.{recipe.family.index(member)}"


def trials_folder(context: Context) -> str:
    """Where trials are kept: not under the search, so that a space with more widths finds those of the narrower one."""
    rest = {name: value for name, value in inputs(context).items() if name not in _WHICH}
    return storage.join(context.places.storage, "trials", storage.fingerprint({**rest, "version": VERSION}))


def memory_per_trial(resources: ResolvedResources, wanted: int) -> int:
    """Bytes of main memory to ask Ray for, for each worker of a trial that needs `wanted`; 0 on GPUs, where the GPU's is
    needed instead. No more than the largest node offers: one trial at a time always runs."""
    from minitron_platform.cluster.room import cluster_nodes

    if resources.gpus_per_trial:
        return 0
    roomy = (n.get("memory", 0) for n in cluster_nodes() if n.get("CPU", 0) >= resources.cpus_per_trial)
    largest = max(roomy, default=wanted) - RESERVED_BYTES
    return int(min(wanted, largest))


def inputs(context: Context) -> dict[str, Any]:
    search = context.recipe.search
    return {
        "targets": context.done["targets"]["fingerprint"],
        "base": context.base["id"],
        "scores": context.done["calibrate"]["id"],
        "heldout": [context.done["data"]["heldout"], search.heldout_rows],
        "space": context.member.space,
        "points": context.member.points,
        "limits": asdict(limits) if (limits := limits_of(context.recipe, context.member)) else None,
        "parameters": context.member.parameters,
        "tolerance": context.member.tolerance,
        "rungs": rungs(context.recipe),
        "sampler": search.sampler.model_dump() if search.sampler else None,
        "forward": search.forward.model_dump() if search.forward else None,
        "halving": search.halving.model_dump() if search.halving else None,
        "benchmarks": {"keep": asked.keep, **asked.identity()} if (asked := benchmarks(context)) else None,
        "losses": asdict(logit_losses(context.recipe)),
        # how often to checkpoint changes nothing about the result
        "training": search.training.model_dump(exclude={"checkpoint_every"}),
    }


def run(context: Context, folder: str) -> dict[str, Any]:
    from minitron_platform.estimates.memory import trial_memory
    from minitron_platform.stages.shortlist import shortlist
    from minitron_search.benchmarks import benchmark_best
    from minitron_search.pool import Pool
    from minitron_search.ranking import with_columns
    from minitron_search.stability import settled
    from minitron_search.tuning import search

    recipe, asked = context.recipe, benchmarks(context)
    teacher = Architecture.from_dict(context.done["teacher"]["architecture"])
    base = Architecture.from_dict(context.base["architecture"])
    task = SearchTask(
        materials=materials(context),
        origin=origin(context),
        config=distill_config(recipe.search.training),
        losses=logit_losses(recipe),
        folder=trials_folder(context),
        heldout_rows=recipe.search.heldout_rows,
        threads=max(1, int(recipe.resources.cpus_per_trial)),
        rungs=rungs(recipe),
        keep_weights=asked is not None,
    )
    context.console.status("starting Ray")
    resources = context.need_ray()
    value_bytes = DTYPES[context.done["teacher"]["dtype"]].itemsize
    most = max(architectures(recipe, context.member, base), key=lambda a: a.num_parameters)
    memory = memory_per_trial(resources, trial_memory(recipe, teacher, most, value_bytes).total)
    pool = Pool(
        storage.join(folder, "tune"),
        share=resources.trial_share | ({"memory": memory} if memory else {}),
        workers=resources.workers_per_trial,
        max_failures=resources.max_failures,
    )
    lease = context.lease(f"trials-{task.folder.rsplit('/', 1)[-1]}", "a search over the same trials")
    with lease, pool.open() as pool:  # the workers stay until the end
        found, milliseconds = shortlist(context, task, pool)
        distilled = distilled_count(recipe, len(found), len(context.member.points))
        view = TrialsView(
            context,
            task,
            found,
            scoring=recipe.search.forward is not None,
            to_end=_to_end(recipe, distilled),
            planned=search_steps(recipe, distilled),
        )
        result = search(
            task,
            found,
            forward_keep=recipe.search.forward.keep if recipe.search.forward else None,
            pinned=pinned(recipe, context.member, base),
            halving=halving(recipe),
            pool=replace(pool, on_event=view.event),
        )
        if asked:
            context.console.status(f"benchmarks of the best {min(asked.keep, len(result.ranking))}")
            result = benchmark_best(task, result, found, asked, pool)
    serving = limits_of(recipe, context.member) or Limits(context=recipe.data.seq_length)
    memories = {str(a): serving.needs(a)["memory_bytes"] for a in found}
    result = with_columns(result, {"memory_bytes": memories} | ({"latency_ms": milliseconds} if milliseconds else {}))
    winner = result.ranking[result.ranking["winner"]].iloc[0]
    passed_over = set() if result.forward is None else set(result.forward.query("not distilled")["architecture"])
    return {
        "winner": result.winner.to_dict(),
        "reason": result.reason,
        "ranking": _records(result.ranking),
        "stopped": _records(result.stopped),
        "forward": None if result.forward is None else _records(result.forward),
        "stability": _records(result.stability),
        "settled": settled(result.stability),
        "saved": result.saved,
        "failures": result.failures,
        "restarts": [asdict(restart) for restart in view.restarts],
        "benchmarks": [task.name for task in asked.tasks] if asked else [],
        "metrics": result.metrics,
        "serving": asdict(serving),
        "candidates": len(found),
        "architectures": [a.to_dict() for a in found if str(a) not in passed_over],
        "trials": task.folder,
        "summary": f"{_counts(result, len(found))} · winner {result.winner} · KL {winner['kl']:.3f} · {result.reason}",
    }


def benchmarks(context: Context) -> Benchmarks | None:
    """What the best candidates are asked after their short distillation, if anything."""
    asked = context.recipe.search.evaluate
    if asked is None:
        return None
    from minitron_platform.recipes.tasks import lm_eval_tasks
    from minitron_search.benchmarks import Benchmarks

    return Benchmarks(
        tasks=lm_eval_tasks(asked.tasks),
        keep=asked.keep,
        tokenizer=context.done["teacher"]["folder"],
        batch_rows=context.recipe.evaluate.batch_rows,
        add_bos=context.recipe.data.bos,
    )


def halving(recipe: Recipe) -> Halving | None:
    """How the recipe's search stops candidates early."""
    return Halving(**recipe.search.halving.model_dump()) if recipe.search.halving else None


def rungs(recipe: Recipe) -> tuple[int, ...]:
    """The steps after which every candidate is measured on its way."""
    return rung_steps(recipe.search.rungs, recipe.search.training.steps)


def distilled_count(recipe: Recipe, candidates: int, points: int) -> int:
    """How many of the candidates are distilled, at most."""
    forward = recipe.search.forward
    return min(candidates, forward.keep + points) if forward else candidates


def search_steps(recipe: Recipe, distilled: int) -> int:
    """Training steps of all trials together."""
    return planned_steps(distilled, recipe.search.training.steps, _cuts(recipe), _keep(recipe))


def _to_end(recipe: Recipe, distilled: int) -> int:
    """How many no rung stops."""
    for _ in _cuts(recipe):
        distilled = kept(distilled, _keep(recipe))
    return distilled


def _keep(recipe: Recipe) -> float:
    return recipe.search.halving.keep if recipe.search.halving else 1


def _cuts(recipe: Recipe) -> list[int]:
    """Rungs at which candidates are certain to be stopped."""
    steps, rule = recipe.search.training.steps, halving(recipe)
    if rule is None or rule.grace == "stable":
        return []
    return rule.cuts(rungs(recipe), steps)


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads(table.to_json(orient="records"))
    return records


def _counts(result: SearchResult, candidates: int) -> str:
    """How many candidates got how far."""
    parts = [] if result.forward is None else [f"{len(result.forward)} scored undistilled"]
    if len(result.stopped):
        parts.append(f"{len(result.stopped)} stopped early")
    parts.append(f"{len(result.ranking)} of {candidates} candidates distilled")
    return ", ".join([*parts, f"{len(result.failures)} failed"] if result.failures else parts)


def record(context: Context, outputs: dict[str, Any]) -> None:
    """Write every trial's result into its record, whichever run and process computed it."""
    winner = str(Architecture.from_dict(outputs["winner"]))
    context.log("search").tags({"minitron.winner": winner, "minitron.winner_reason": outputs["reason"]})
    record_trials(context, outputs)
