"""Runs a recipe: every stage in order. A finished stage is recognised by its fingerprint and not repeated."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.markup import escape

from minitron import storage
from minitron.arguments import check_type
from minitron.device import compute_dtype
from minitron.errors import InputError, StorageError
from minitron_platform.cluster import hardware
from minitron_platform.cluster.head_watch import HeadWatch
from minitron_platform.cluster.room import joins_cluster
from minitron_platform.cluster.watch import ClusterWatch
from minitron_platform.console import Console, seconds
from minitron_platform.fence import Fence, LeaseLostError
from minitron_platform.leases import lease
from minitron_platform.locations import Locations, resolve_locations
from minitron_platform.monitoring import Monitor
from minitron_platform.planning.plan import Plan, plan
from minitron_platform.recipes.load import check_recipe_type, recipe_yaml
from minitron_platform.recipes.schema import Member, Recipe
from minitron_platform.results import RunResult
from minitron_platform.run_record import RECIPE_FILE, RunRecord
from minitron_platform.stages.calibrate import Calibrate
from minitron_platform.stages.context import Context
from minitron_platform.stages.finished import finished_record, is_finished, run_key
from minitron_platform.stages.order import stage_names, steps
from minitron_platform.stages.ray_start import RayStart
from minitron_platform.stages.register import Register
from minitron_platform.stages.registration import ANSWER_SECONDS
from minitron_platform.stages.search import Search
from minitron_platform.stages.stage import Stage, StageOutput
from minitron_platform.stages.stage_records import Record, relative, write_record
from minitron_platform.stages.targets import Targets
from minitron_platform.stopping import stopped_by_signals
from minitron_platform.system_metrics import system_metrics
from minitron_platform.tracking.check import BEST_EFFORT
from minitron_platform.tracking.client import RegistryError
from minitron_platform.tracking.events import status_of
from minitron_platform.tracking.flusher import STOP_PATIENCE, Flusher
from minitron_platform.tracking.restarts import RESTARTS, Restarts, read_restarts
from minitron_platform.tracking.spool import RunLog, Spool
from minitron_platform.workers.workers import Workers
from minitron_search.memory import release_memory

# Stages that compute in this process before the first stage that needs Ray; Ray starts in the background meanwhile.
BEFORE_RAY = (Calibrate.name, Targets.name)


def run(
    recipe: Recipe,
    *,
    storage_path: str | Path | None = None,
    tracking_uri: str | None = None,
    address: str | None = None,
    until: str | None = None,
    take_over: bool = False,
    console: Console | None = None,
    planned: Plan | None = None,
) -> RunResult:
    """Run `recipe` and return its students, their metrics and the report. Stages that are already finished are reused.

    storage_path: a folder or any fsspec address (default: MINITRON_STORAGE, or ./runs).
    tracking_uri: MLflow's server or database (default: MLFLOW_TRACKING_URI, or SQLite in the storage).
    address: a running Ray cluster (default: a private Ray on this machine).
    until: name of the last stage to run; if each model of the family has its own, that of the first model.
    take_over: if another driver is running this recipe, take the run over instead of waiting until it ends.
    console: receives progress messages. planned: the result of `plan` for the same arguments; by default the recipe is planned
    first, unless all of its stages are finished.

    A run that was killed resumes from the last finished stage, trial or checkpoint when it is called again.
    Raises what `plan` raises before anything starts, LeaseLostError if another driver takes the run over, and other
    MinitronErrors for problems that the user can fix.
    """
    names = stage_names()
    check_recipe_type(recipe)
    if console is not None:
        check_type("console", console, Console)
    if planned is not None:
        check_type("planned", planned, Plan, "the result of plan")
    if until is not None and until not in names:
        raise InputError(f"until: {until!r} is not a stage", f"use one of {', '.join(names)}")
    console = console or Console()
    if planned is None and not has_run(recipe, storage_path, tracking_uri, address):
        with console.working("planning"):
            plan(recipe, storage_path=storage_path, tracking_uri=tracking_uri, address=address)
    locations = resolve_locations(storage_path, tracking_uri)
    key = run_key(recipe)
    with stopped_by_signals(), _run_lease(locations, key, console, take_over) as fence, _closing(console) as stack:
        run_folder = locations.local_run(key)
        for folder in dict.fromkeys((run_folder, locations.run(key))):
            storage.write_bytes(storage.join(folder, RECIPE_FILE), recipe_yaml(recipe).encode(), private=True)
        monitor = stack.enter_context(Monitor(key))
        spool = Spool(locations.spool(key), experiment=recipe.experiment, older=locations.older_spool(key))
        stack.callback(spool.close)
        flusher = stack.enter_context(Flusher(spool, locations.tracking_uri, recipe.experiment))
        spool.on_event, flusher.on_unsent = monitor.event, monitor.unsent
        stack.callback(lambda: console.status(flusher.text))  # while the flusher closes
        head = stack.enter_context(HeadWatch(console, lambda: leave()))
        ray = RayStart(stack, address, storage.join(run_folder, "logs"), head.start)
        workers = Workers(
            console,
            start_ray=lambda: context.ensure_ray(),
            computes_here=ray.computes_here,
            scratch=storage.join(locations.run(key), "workers"),
            look=ClusterWatch(console, recipe.resources.wait_timeout).look,
            before_commit=lambda: context.fences.check,
        )
        context = Context(
            recipe=recipe,
            locations=locations,
            console=console,
            run_key=key,
            held=[fence],
            start_ray=ray.need,
            workers=workers,
            spool=spool,
            mlflow_run_id=lambda record: flusher.wait_for(record, timeout=ANSWER_SECONDS),
        )
        run_record = RunRecord(context)

        def leave() -> None:
            run_record.end("FAILED")
            spool.end_open("KILLED")
            flusher.close(STOP_PATIENCE)
            spool.close()

        needs_ray = until is None or names.index(until) >= names.index(Search.name)

        def before_work(name: str) -> None:
            if joins_cluster(address):
                context.ensure_ray()  # already now, so that a cluster that is too small is refused before any work
            elif needs_ray and name in BEFORE_RAY:
                ray.ahead(context)
            run_record.reopen()  # finished before, and a stage computes again: its input has changed or was deleted
            if run_record.hardware(hardware.cluster() if joins_cluster(address) else hardware.machine()):
                stack.enter_context(system_metrics(run_record.system))

        try:
            ray.choose_devices(context)
            for stage, member in steps(recipe):
                context.current = member
                _run_stage(context, stage, run_record, before_work)
                if stage.name == until:
                    break
            else:
                _register_again(context, run_record, before_work)
                _report(context, run_record)
                _check_registered(context)
        except BaseException as error:
            if not _is_lost(fence):  # otherwise the record belongs to the driver that continues the run
                run_record.end(status_of(error))
                spool.end_open("KILLED")  # trials
            raise
        finally:
            workers.close()
        run_record.end("FINISHED")
    return RunResult(context)


def has_run(
    recipe: Recipe, storage_path: str | Path | None = None, tracking_uri: str | None = None, address: str | None = None
) -> bool:
    """Whether all stages of `recipe` are finished, so that there is nothing to plan. The arguments are those of `run`.

    False for a run on a cluster, whose GPUs decide the dtype and are not known yet.
    """
    if joins_cluster(address):
        return False
    return is_finished(recipe, resolve_locations(storage_path, tracking_uri), compute_dtype(recipe.teacher.dtype))


@contextmanager
def _run_lease(locations: Locations, key: str, console: Console, take_over: bool) -> Iterator[Fence]:
    """Hold the lease of the run inside the block."""
    with ExitStack() as stack:
        with console.working("waiting"):
            reason = "as --take-over says" if take_over else ""
            run_lease = lease(locations, f"run-{key}", f"run {key}", run=key, console=console, take_over=reason)
            fence = stack.enter_context(run_lease)
        yield fence


def _is_lost(fence: Fence) -> bool:
    """Whether another driver has taken the lease over."""
    try:
        fence.check()
    except LeaseLostError:
        return True
    except (OSError, StorageError):  # the storage does not answer, so nobody can take the lease over through it
        return False
    return False


def _waiting(context: Context) -> Iterator[Member]:
    """The models of the family that MLflow has not taken, parents before the models cut from them."""
    return (member for member in context.recipe.family if not context.output(Register, member).is_final)


def _register_again(context: Context, run_record: RunRecord, before_work: Callable[[str], None]) -> None:
    """Register the models whose registration waits, up to the first that MLflow does not take now either."""
    for member in _waiting(context):
        context.current = member
        _run_stage(context, Register(), run_record, before_work)
        if not context.output(Register).is_final:
            break


def _check_registered(context: Context) -> None:
    """Raise RegistryError if a model is not registered, unless the recipe goes on without MLflow."""
    waiting = [member.model for member in _waiting(context)]
    if not waiting:
        return
    problem = f"{', '.join(waiting)}: not in the registry, because MLflow did not take it; all else is finished"
    remedy = (
        "check that MLflow answers, and run `minitron sync` with the same --storage and --tracking-uri, or the recipe"
    )
    if context.recipe.tracking != BEST_EFFORT:
        raise RegistryError(problem, remedy)
    context.console.say(f"[yellow]{escape(problem)}[/]\n[yellow]{escape(f'To register it, {remedy}')}[/]")


def _report(context: Context, run_record: RunRecord) -> None:
    """Write the report, and the results to the run's record if that is open."""
    from minitron_platform.report.write import write_report

    context.check_fences()
    write_report(context, run_record)
    if run_record.open:
        run_record.results()


@contextmanager
def _closing(console: Console) -> Iterator[ExitStack]:
    """An ExitStack that shows a status while it closes, which waits for Ray to stop and for MLflow to take all events."""
    stack = ExitStack()
    try:
        yield stack
    except BaseException as error:
        with console.working("stopping"):
            stack.__exit__(type(error), error, error.__traceback__)
        raise
    with console.working("closing"):
        stack.close()


def _run_stage(context: Context, stage: Stage[Any], run_record: RunRecord, before_work: Callable[[str], None]) -> None:
    """Run a stage, or reuse its output if it is finished, and record it."""
    console = context.console
    name = stage.name
    if stage.name == Calibrate.name and len(context.recipe.family) > 1:
        origin = context.recipe.origin(context.member)
        console.say(f"[bold]{escape(context.member.model)}[/], cut from {origin.model if origin else 'the teacher'}")
    with console.working(f"[bold]{name}[/]"):
        fingerprint = context.fingerprint(stage)
        folder = context.locations.stage(name, fingerprint)
        record = finished_record(context, stage, folder, console)
        reused = record is not None
        log = run_record.stage_log(name)
        if record is None:
            before_work(name)
            log.start(context.title(name), parent=context.run_key, tags={"minitron.kind": "stage"}, of=fingerprint)
            try:
                with context.lease(f"{name}-{fingerprint}", f"stage {name}"):
                    record = finished_record(context, stage, folder, console)  # another run may have done it
                    reused = record is not None
                    if record is None:
                        record = _compute(context, stage, folder, fingerprint)
            except BaseException as error:
                if not _is_lost(context.held[0]):  # otherwise the record belongs to the other driver, as above
                    log.end(status_of(error))
                raise
        context.finish(stage, record.output)
        context.seconds[record.output.fingerprint] = record.seconds
        _log_stage(context, stage, log, record, reused)
        run_record.finished_stage(name)
    took = "already done" if reused else seconds(record.seconds)
    mark = "[green]✓[/]" if record.output.is_final else "[yellow]…[/]"
    console.say(f"{mark} [bold]{name:<10}[/] {escape(record.output.summary)} [dim]· {took}[/]")


def _compute(context: Context, stage: Stage[Any], folder: str, fingerprint: str) -> Record:
    """Run a stage and store its record. Raises LeaseLostError if another driver has taken over the run or the stage."""
    started = time.time()
    path = storage.join(folder, RESTARTS)
    log = context.log(stage.name)

    def restarts() -> Restarts:
        return Restarts(log, path, before_commit=context.fences.check, say=context.console.say)

    with context.named_errors(stage), context.workers.storing(lambda restart: restarts().add(restart)):
        output = stage.run(context, folder)
    release_memory()
    known = (*output.restarts, *read_restarts(path))
    record = Record(
        output=output.model_copy(update={"fingerprint": fingerprint, "restarts": known}),
        seconds=time.time() - started,
        artifacts=sorted(_artifacts(output)),
    )
    context.check_fences()
    write_record(context.locations.storage, folder, record)
    return record


def _artifacts(output: StageOutput) -> Iterator[str]:
    """The files that must exist for the output to be reused; a committed folder is represented by its manifest."""
    for path in output.artifacts():
        yield storage.join(path, storage.MANIFEST) if storage.is_committed(path) else path


def _log_stage(context: Context, stage: Stage[Any], log: RunLog, record: Record, reused: bool) -> None:
    """Write a stage's output to its MLflow record, unless it is there already."""
    if reused and log.is_finished:
        return
    output = record.output
    if reused:
        tags = {"minitron.kind": "stage"}
        log.start(context.title(stage.name), parent=context.run_key, tags=tags, of=output.fingerprint)
    stage.record(context, output)
    log.tags({"minitron.reused": reused, "minitron.fingerprint": output.fingerprint, "summary": output.summary})
    params = {k: v for k, v in dict(output).items() if isinstance(v, str | int) and k not in ("summary", "fingerprint")}
    log.params({k: relative(context.locations.storage, v) if isinstance(v, str) else v for k, v in params.items()})
    log.metrics({"seconds": record.seconds, **stage.metrics(output)}, step=0)
    log.end("FINISHED")
    context.spool.flush()
