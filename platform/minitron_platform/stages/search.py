"""Search: every candidate in the budget gets a short distillation on Ray Tune; the best held-out KL wins."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from minitron import storage
from minitron.architecture import Architecture
from minitron.device import DTYPES
from minitron_platform.recipes import build
from minitron_platform.recipes.build import distill_config, logit_losses
from minitron_platform.recipes.candidates import CandidateSpace
from minitron_platform.recipes.resources import ResolvedResources
from minitron_platform.recipes.search_schedule import SearchSchedule
from minitron_platform.stages.context import Context
from minitron_platform.stages.search_output import FailedCandidate, SearchOutput
from minitron_platform.stages.targets import materials, origin
from minitron_platform.stages.trial_records import TrialsView, record_trials
from minitron_search.limits import Limits
from minitron_search.placement import RESERVED_BYTES
from minitron_search.ranking import winner_of
from minitron_search.trial import SearchTask

if TYPE_CHECKING:
    from minitron_search.results import SearchResult

VERSION = 3
TRIALS_VERSION = 3  # raised only when what a trial computes changes: trials that have finished are never done again
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


def trials_folder(context: Context) -> str:
    """Where trials are kept: not under the search, so that a space with more widths finds those of the narrower one."""
    rest = {name: value for name, value in inputs(context).items() if name not in _WHICH}
    return storage.join(context.places.storage, "trials", storage.fingerprint({**rest, "version": TRIALS_VERSION}))


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
    limits = build.limits(context.recipe, context.member)
    benchmarks = build.benchmarks(context.recipe, context.done["teacher"]["folder"])
    return {
        "targets": context.done["targets"]["fingerprint"],
        "base": context.base["id"],
        "scores": context.done["calibrate"]["id"],
        "heldout": [context.done["data"]["heldout"], search.heldout_rows],
        "space": context.member.space,
        "points": context.member.points,
        "limits": asdict(limits) if limits else None,
        "parameters": context.member.parameters,
        "tolerance": context.member.tolerance,
        "rungs": SearchSchedule(search).rungs,
        "sampler": search.sampler.model_dump() if search.sampler else None,
        "forward": search.forward.model_dump() if search.forward else None,
        "halving": search.halving.model_dump() if search.halving else None,
        "benchmarks": {"keep": benchmarks.keep, **benchmarks.identity()} if benchmarks else None,
        "losses": asdict(logit_losses(context.recipe)),
        # how often to checkpoint changes nothing about the result
        "training": search.training.model_dump(exclude={"checkpoint_every"}),
    }


def run(context: Context, folder: str) -> dict[str, Any]:
    from minitron_platform.estimates.memory import trial_memory
    from minitron_platform.stages.shortlist import shortlist
    from minitron_search import benchmark_best, search
    from minitron_search.pool import Pool
    from minitron_search.stability import settled

    recipe = context.recipe
    benchmarks = build.benchmarks(recipe, context.done["teacher"]["folder"])
    teacher = Architecture.from_dict(context.done["teacher"]["architecture"])
    space = CandidateSpace(recipe, context.member, Architecture.from_dict(context.base["architecture"]))
    schedule = SearchSchedule(recipe.search)
    task = SearchTask(
        materials=materials(context),
        origin=origin(context),
        config=distill_config(recipe.search.training),
        losses=logit_losses(recipe),
        folder=trials_folder(context),
        heldout_rows=recipe.search.heldout_rows,
        threads=max(1, int(recipe.resources.cpus_per_trial)),
        rungs=schedule.rungs,
        keep_weights=benchmarks is not None,
    )
    context.console.status("starting Ray")
    resources = context.need_ray()
    value_bytes = DTYPES[context.done["teacher"]["dtype"]].itemsize
    largest = max(space.candidates, key=lambda a: a.num_parameters)
    memory = memory_per_trial(resources, trial_memory(recipe, teacher, largest, value_bytes).total)
    pool = Pool(
        storage.join(folder, "tune"),
        share=resources.trial_share | ({"memory": memory} if memory else {}),
        workers=resources.workers_per_trial,
        max_failures=resources.max_failures,
    )
    lease = context.lease(f"trials-{task.folder.rsplit('/', 1)[-1]}", "a search over the same trials")
    with lease, pool.open() as pool:  # the workers stay until the end
        found, milliseconds = shortlist(context, space, task, pool)
        distilled = schedule.distilled(len(found), len(context.member.points))
        view = TrialsView(
            context,
            task,
            found,
            scoring=recipe.search.forward is not None,
            to_end=schedule.to_end(distilled),
            planned=schedule.total_steps(distilled),
        )
        result = search(
            task,
            found,
            forward_keep=recipe.search.forward.keep if recipe.search.forward else None,
            pinned=space.points,
            halving=schedule.halving,
            pool=replace(pool, on_event=view.event),
        )
        if benchmarks:
            context.console.status(f"benchmarks of the best {min(benchmarks.keep, len(result.ranking))}")
            result = benchmark_best(task, result, found, benchmarks, pool)
    serving = space.limits or Limits(context=recipe.data.seq_length)
    ranking = tuple(
        replace(
            candidate,
            memory_bytes=serving.needs(candidate.architecture)["memory_bytes"],
            latency_ms=milliseconds.get(candidate.architecture),
        )
        for candidate in result.ranking
    )
    skipped = {candidate.architecture for candidate in result.forward or () if not candidate.distilled}
    kl = winner_of(ranking).kl
    output = SearchOutput(
        winner=result.winner,
        reason=result.reason,
        ranking=ranking,
        stopped=tuple(result.stopped),
        forward=None if result.forward is None else tuple(result.forward),
        stability=tuple(result.stability),
        settled=settled(result.stability),
        saved=result.saved,
        failures=tuple(FailedCandidate(architecture, why) for architecture, why in result.failures.items()),
        restarts=tuple(view.restarts),
        benchmarks=tuple(task.name for task in benchmarks.tasks) if benchmarks else (),
        serving=serving,
        candidates=len(found),
        architectures=tuple(architecture for architecture in found if architecture not in skipped),
        trials=task.folder,
        summary=f"{_counts(result, len(found))} · winner {result.winner} · KL {kl:.3f} · {result.reason}",
    )
    return output.model_dump(mode="json")


def _counts(result: SearchResult, candidates: int) -> str:
    """How many candidates got how far."""
    parts = [] if result.forward is None else [f"{len(result.forward)} scored undistilled"]
    if len(result.stopped):
        parts.append(f"{len(result.stopped)} stopped early")
    parts.append(f"{len(result.ranking)} of {candidates} candidates distilled")
    return ", ".join([*parts, f"{len(result.failures)} failed"] if result.failures else parts)


def record(context: Context, outputs: dict[str, Any]) -> None:
    """Write every trial's result into its record, whichever run and process computed it."""
    output = SearchOutput.model_validate(outputs)
    context.log("search").tags({"minitron.winner": str(output.winner), "minitron.winner_reason": output.reason})
    record_trials(context, output)
