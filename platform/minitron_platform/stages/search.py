"""Search: a short distillation of every candidate on Ray Tune; the lowest held-out KL to the teacher wins."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from minitron import storage
from minitron.device import DTYPES
from minitron_platform.estimates.gpu import trials_on_gpus
from minitron_platform.estimates.memory import search_memory, trial_memory
from minitron_platform.estimates.node_memory import training_work
from minitron_platform.estimates.outlook import MASTER_BYTES, Estimate, Outlook
from minitron_platform.estimates.phases import search_parts
from minitron_platform.recipes import build, schema
from minitron_platform.recipes.build import logit_losses, training_identity
from minitron_platform.recipes.candidates import CandidateSpace
from minitron_platform.recipes.resources import ResolvedResources
from minitron_platform.recipes.search_schedule import SearchSchedule
from minitron_platform.stages.base import pruning_base
from minitron_platform.stages.calibrate import Calibrate
from minitron_platform.stages.context import Context
from minitron_platform.stages.data import Data
from minitron_platform.stages.search_output import FailedCandidate, SearchOutput
from minitron_platform.stages.stage import Stage
from minitron_platform.stages.state import RunState
from minitron_platform.stages.targets import Targets, distill_inputs, pruning_source
from minitron_platform.stages.teacher import Teacher
from minitron_platform.stages.trainings import training_settings
from minitron_platform.stages.trial_records import TrialsView, record_trials
from minitron_search.limits import Limits
from minitron_search.placement import RESERVED_BYTES
from minitron_search.ranking import winner_of
from minitron_search.search_task import SearchTask
from minitron_search.space import combinations

if TYPE_CHECKING:
    from minitron_search.benchmarks import Benchmarks
    from minitron_search.results import SearchResult

TRIALS_VERSION = 3  # raised only if a trial computes something else: finished trials of the same version are reused
# Inputs that decide which candidates are trained and for how long, but not what their trials compute.
_NOT_OF_TRIALS = (
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


class Search(Stage[SearchOutput]):
    name = "search"
    version = 3
    per_model = True
    output_type = SearchOutput

    def inputs(self, state: RunState) -> dict[str, Any]:
        search = state.recipe.search
        limits = build.limits(state.recipe, state.member)
        benchmarks = _benchmarks(state)
        return {
            "targets": state.output(Targets).fingerprint,
            "base": pruning_base(state).id,
            "scores": state.output(Calibrate).id,
            "heldout": [state.output(Data).heldout, search.heldout_rows],
            "space": state.member.space,
            "points": state.member.points,
            "limits": _limits_input(limits),
            "parameters": state.member.parameters,
            "tolerance": state.member.tolerance,
            "rungs": SearchSchedule(search).rungs,
            "sampler": search.sampler.model_dump() if search.sampler else None,
            "forward": search.forward.model_dump() if search.forward else None,
            "halving": search.halving.model_dump() if search.halving else None,
            "benchmarks": {"keep": benchmarks.keep, **benchmarks.identity()} if benchmarks else None,
            "losses": asdict(logit_losses(state.recipe)),
            "training": training_identity(search.training),
        }

    def estimate(self, outlook: Outlook, member: schema.Member | None) -> Estimate:
        assert member is not None
        recipe = outlook.recipe
        shapes = outlook.shapes(member)
        largest = outlook.largest(member)
        schedule = SearchSchedule(recipe.search)
        distilled = schedule.distilled(len(shapes), len(member.points))
        step_tokens = recipe.search.training.batch_rows * recipe.data.seq_length
        disk_bytes = 0
        if schedule.halving:  # all trials keep a checkpoint while they wait at a rung
            disk_bytes += 2 * MASTER_BYTES * largest.num_parameters * distilled
        if recipe.search.training.checkpoint_every:
            concurrent_trials = max(1, min(len(shapes), outlook.concurrent_trials))
            disk_bytes += 3 * MASTER_BYTES * largest.num_parameters * concurrent_trials
        if recipe.search.evaluate:
            disk_bytes += outlook.value_bytes * largest.num_parameters * distilled  # all keep their weights to the end
        gpu = trials_on_gpus(
            recipe, outlook.teacher, outlook.base(member), largest, outlook.value_bytes, outlook.resources
        )
        return Estimate(
            _work_text(outlook, member, distilled, schedule.steps * step_tokens),
            bytes=disk_bytes,
            start_up_seconds=20,
            memory=search_memory(
                recipe, outlook.teacher, largest, outlook.value_bytes, outlook.resources.workers_per_trial
            ),
            gpu=gpu,
            node=training_work(gpu, trials=len(shapes)),
            parts=search_parts(outlook, member),
        )

    def run(self, context: Context, folder: str) -> SearchOutput:
        from minitron_platform.stages.shortlist import shortlist
        from minitron_search import benchmark_best, search
        from minitron_search.pool import Pool
        from minitron_search.stability import settled

        recipe = context.recipe
        benchmarks = _benchmarks(context)
        teacher = context.output(Teacher).architecture
        base = pruning_base(context).architecture
        space = CandidateSpace(recipe, context.member, base)
        schedule = SearchSchedule(recipe.search)
        resources = context.ensure_ray()
        context.workers.make_room()
        value_bytes = DTYPES[context.output(Teacher).dtype].itemsize
        largest = max(space.candidates, key=lambda a: a.num_parameters)
        on_gpus = trials_on_gpus(recipe, teacher, base, largest, value_bytes, resources)
        config, _ = training_settings(context, self.name, recipe.search.training, on_gpus)
        task = SearchTask(
            materials=distill_inputs(context),
            origin=pruning_source(context),
            config=config,
            losses=logit_losses(recipe),
            folder=trials_folder(context),
            heldout_rows=recipe.search.heldout_rows,
            threads=max(1, int(recipe.resources.cpus_per_trial)),
            rungs=schedule.rungs,
            keep_weights=benchmarks is not None,
        )
        memory = memory_per_trial(resources, trial_memory(recipe, teacher, largest, value_bytes).total)
        pool = Pool(
            storage.join(folder, "tune"),
            share=resources.trial_share | ({"memory": memory} if memory else {}),
            workers=resources.workers_per_trial,
            least=resources.least_workers_per_trial,
            max_failures=resources.max_failures,
            look=context.workers.look,
        )
        lease = context.lease(f"trials-{task.folder.rsplit('/', 1)[-1]}", "a search over the same trials")
        with lease, pool.open() as pool:  # the same workers serve the whole search
            task = replace(task, before_commit=context.fences.check)
            candidates, milliseconds = shortlist(context, space, task, pool)
            distilled = schedule.distilled(len(candidates), len(context.member.points))
            view = TrialsView(
                context,
                task,
                candidates,
                scoring=recipe.search.forward is not None,
                to_end=schedule.to_end(distilled),
                planned=schedule.total_steps(distilled),
            )
            result = search(
                task,
                candidates,
                forward_keep=recipe.search.forward.keep if recipe.search.forward else None,
                pinned=space.points,
                halving=schedule.halving,
                pool=replace(pool, on_event=view.event),
            )
            if benchmarks:
                context.console.status(f"benchmarks of the best {min(benchmarks.keep, len(result.ranking))}")
                result = benchmark_best(task, result, candidates, benchmarks, pool)
        serving = space.limits or Limits(context=recipe.data.seq_length)
        ranking = tuple(
            replace(
                candidate,
                memory_bytes=serving.needs(candidate.architecture)["memory_bytes"],
                latency_ms=milliseconds.get(candidate.architecture, {}).get("latency_ms"),
                token_latency_ms=milliseconds.get(candidate.architecture, {}).get("token_latency_ms"),
            )
            for candidate in result.ranking
        )
        skipped = {candidate.architecture for candidate in result.forward or () if not candidate.distilled}
        kl = winner_of(ranking).kl
        return SearchOutput(
            winner=result.winner,
            reason=result.reason,
            ranking=ranking,
            stopped=tuple(result.stopped),
            forward=None if result.forward is None else tuple(result.forward),
            stability=tuple(result.stability),
            settled=settled(result.stability),
            saved=result.saved,
            failures=tuple(FailedCandidate(architecture, reason) for architecture, reason in result.failures.items()),
            restarts=view.restarts.of(candidates),
            benchmarks=tuple(task.key for task in benchmarks.tasks) if benchmarks else (),
            serving=serving,
            candidates=len(candidates),
            architectures=tuple(architecture for architecture in candidates if architecture not in skipped),
            trials=task.folder,
            summary=f"{_counts_text(result, len(candidates))} · winner {result.winner} · KL {kl:.3f} · {result.reason}",
        )

    def record(self, context: Context, output: SearchOutput) -> None:
        """Write the result of every trial into its record, including those of trials that an earlier run finished."""
        tags = {"minitron.winner": str(output.winner), "minitron.winner_reason": output.reason}
        context.log(self.name).tags(tags)
        record_trials(context, output)


def _benchmarks(state: RunState) -> Benchmarks | None:
    teacher = state.output(Teacher)
    return build.benchmarks(state.recipe, teacher.folder, teacher.chat_template, teacher.generation)


def trials_folder(state: RunState) -> str:
    """Folder of the trials. It is not inside the search's own folder, so that a search of a larger space reuses the trials
    of a smaller one."""
    inputs = {name: value for name, value in Search().inputs(state).items() if name not in _NOT_OF_TRIALS}
    return storage.join(state.locations.storage, "trials", storage.fingerprint({**inputs, "version": TRIALS_VERSION}))


def _limits_input(limits: Limits | None) -> dict[str, Any] | None:
    """The limits; one that earlier versions did not have is in the fingerprint only where it is set."""
    if limits is None:
        return None
    values = asdict(limits)
    if limits.token_latency_ms is None:
        del values["token_latency_ms"]
    return values


def _work_text(outlook: Outlook, member: schema.Member, distilled: int, tokens: int) -> str:
    """How many candidates are scored, trained and benchmarked, and for how long, as text."""
    search = outlook.recipe.search
    count = len(outlook.shapes(member))
    sampled = outlook.family[member.model].sampled
    at_most = "up to " if outlook.recipe.origin(member) else ""
    text = ""
    if member.limits and member.limits.times_candidates:
        text = f"at least {count} shapes timed, " if sampled else f"{at_most}{count} shapes timed, "
    text += f"{at_most}{count} candidates" + (" scored" if search.forward else "")
    if sampled:
        text += f" of {combinations(member.space):,} combinations"
    if search.forward:
        text += f", {distilled} distilled"
    text += f", {tokens:,} tokens each"
    if search.halving:
        text += ", the worse stopped at rungs" + (" with a stable order" if search.halving.grace == "stable" else "")
    if search.evaluate:
        names = ", ".join(task.name for task in search.evaluate.tasks)
        text += f", {names} for {min(search.evaluate.keep, distilled)}"
    return text


def memory_per_trial(resources: ResolvedResources, needed: int) -> int:
    """Bytes of main memory to reserve in Ray for each worker of a trial that needs `needed`; 0 on GPUs, whose trials need
    little of it. At most what the largest node offers, so that one trial can always run."""
    from minitron_platform.cluster.room import cluster_nodes

    if resources.gpus_per_trial:
        return 0
    offered = [node.get("memory", 0) for node in cluster_nodes() if node.get("CPU", 0) >= resources.cpus_per_trial]
    return int(min(needed, max(offered, default=needed) - RESERVED_BYTES))


def _counts_text(result: SearchResult, candidates: int) -> str:
    """Numbers of candidates that were scored, stopped, distilled and failed, as text."""
    parts = []
    if result.forward is not None:
        parts.append(f"{len(result.forward)} scored undistilled")
    if result.stopped:
        parts.append(f"{len(result.stopped)} stopped early")
    parts.append(f"{len(result.ranking)} of {candidates} candidates distilled")
    if result.failures:
        parts.append(f"{len(result.failures)} failed")
    return ", ".join(parts)
