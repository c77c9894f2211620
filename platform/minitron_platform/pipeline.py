"""One recipe carried out: every stage in order, each done once and recognised by its fingerprint afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.markup import escape

from minitron import storage
from minitron.errors import InputError, StorageError
from minitron_platform.cluster.room import joins_cluster
from minitron_platform.console import Console, seconds
from minitron_platform.fence import Fence, LeaseLostError
from minitron_platform.leases import lease
from minitron_platform.locations import Locations, resolve_locations
from minitron_platform.planning.plan import Plan, plan
from minitron_platform.recipes.build import separates_documents
from minitron_platform.recipes.load import recipe_yaml
from minitron_platform.recipes.schema import Recipe
from minitron_platform.results import RunResult
from minitron_platform.stages.calibrate import Calibrate
from minitron_platform.stages.context import Context
from minitron_platform.stages.evaluate import Evaluate
from minitron_platform.stages.finished import finished_record, run_key
from minitron_platform.stages.order import stage_names, steps
from minitron_platform.stages.ray_start import RayStart
from minitron_platform.stages.search import Search
from minitron_platform.stages.stage import Stage, StageOutput
from minitron_platform.stages.stage_records import Record, relative, write_record
from minitron_platform.stages.targets import Targets
from minitron_platform.tracking.flusher import Flusher
from minitron_platform.tracking.spool import RunLog, read_events
from minitron_search.memory import release_memory

# Stages that compute for a while in this process, when one of those that need Ray comes next.
BEFORE_RAY = (Calibrate.name, Targets.name)


def run(
    recipe: Recipe,
    *,
    storage_path: str | None = None,
    tracking_uri: str | None = None,
    address: str | None = None,
    until: str | None = None,
    take_over: bool = False,
    console: Console | None = None,
    planned: Plan | None = None,
) -> RunResult:
    """Carry out `recipe`, doing only what is not done yet; returns the students, their figures and the report.

    storage_path: any fsspec path (default ./runs or MINITRON_STORAGE). tracking_uri: MLflow's (default SQLite inside the
    storage). address: a running Ray cluster (default: Ray starts in this process). until: the last stage to do, of the
    family's first model where each has its own. take_over: if another driver carries out this run, take it from there instead
    of waiting for it to end. planned: what `plan` returned for the same arguments; without it the recipe is planned first.
    Killed at any point and called again, it goes on from the last finished stage, trial or checkpoint.
    Raises what `plan` raises before anything starts, LeaseLostError when another driver took the run over, and MinitronError
    for what the user can change.
    """
    names = stage_names()
    if until is not None and until not in names:
        raise InputError(f"until: {until!r} is not a stage", f"use one of {', '.join(names)}")
    console = console or Console()
    if planned is None:
        with console.working("planning"):
            plan(recipe, storage_path=storage_path, tracking_uri=tracking_uri, address=address)
    where = resolve_locations(storage_path, tracking_uri)
    key = run_key(recipe)
    with _alone(where, key, console, take_over) as fence, _closing(console) as stack:
        storage.write_bytes(storage.join(where.local_run(key), "recipe.yaml"), recipe_yaml(recipe).encode())
        flusher = stack.enter_context(Flusher(where.spool(key), where.tracking_uri, recipe.experiment))
        ray = RayStart(stack, address, storage.join(where.local_run(key), "logs"))
        context = Context(
            recipe=recipe,
            locations=where,
            console=console,
            run_key=key,
            held=[fence],
            start_ray=ray.need,
            mlflow_run_id=lambda record: flusher.wait_for(record, timeout=30),
        )
        parent = _Parent(context)
        # a cluster without room is refused before the first stage that has work, not at the first that needs Ray
        needed = until is None or names.index(until) >= names.index(Search.name)

        def before_work(name: str) -> None:
            if joins_cluster(address):
                context.ensure_ray()
            elif needed and name in BEFORE_RAY:
                ray.ahead(context)

        try:
            context.auto_dtype = ray.auto_dtype(context)
            for stage, member in steps(recipe):
                context.current = member
                _stage(context, stage, parent, before_work)
                if stage.name == until:
                    break
            else:
                _report(context, parent)
        except BaseException as error:
            if not _is_lost(fence):  # else the record belongs to the driver that goes on with it
                parent.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        parent.end("FINISHED")
    return RunResult(context)


@contextmanager
def _alone(where: Locations, key: str, console: Console, take_over: bool) -> Iterator[Fence]:
    with ExitStack() as stack:
        with console.working("waiting"):
            reason = "as --take-over says" if take_over else ""
            held = lease(where, f"run-{key}", f"run {key}", run=key, console=console, take_over=reason)
            fence = stack.enter_context(held)
        yield fence


def _is_lost(fence: Fence) -> bool:
    try:
        fence.check()
    except LeaseLostError:
        return True
    except (OSError, StorageError):  # the storage is away: nobody can have taken it over through it
        return False
    return False


def _report(context: Context, parent: _Parent) -> None:
    from minitron_platform.report.page import write_report

    write_report(context, parent)
    if parent.open:
        for member in context.recipe.family:
            prefix = f"{member.model}." if len(context.recipe.family) > 1 else ""
            values = Evaluate().metrics(context.output(Evaluate, member))
            parent.log.metrics({prefix + name: value for name, value in values.items()}, step=0)


@contextmanager
def _closing(console: Console) -> Iterator[ExitStack]:
    """A stack whose leaving, which waits for Ray and for what MLflow has not got yet, is shown."""
    stack = ExitStack()
    try:
        yield stack
    except BaseException as error:
        with console.working("stopping"):
            stack.__exit__(type(error), error, error.__traceback__)
        raise
    with console.working("closing"):
        stack.close()


def _stage(context: Context, stage: Stage[Any], parent: _Parent, before_work: Callable[[str], None]) -> None:
    console, name = context.console, stage.name
    if stage.name == Calibrate.name and len(context.recipe.family) > 1:
        origin = context.recipe.origin(context.member)
        console.say(f"[bold]{escape(context.member.model)}[/], cut from {origin.model if origin else 'the teacher'}")
    with console.working(f"[bold]{name}[/]"):
        fingerprint = context.fingerprint(stage)
        folder = context.locations.stage(name, fingerprint)
        record = finished_record(context, stage, folder, console)
        reused = record is not None
        log = parent.child(name)
        if record is None:
            before_work(name)
            log.start(context.title(name), parent=context.run_key, tags={"minitron.kind": "stage"})
            try:
                with context.lease(f"{name}-{fingerprint}", f"stage {name}"):
                    record = finished_record(context, stage, folder, console)  # by another run that was waited for
                    reused = record is not None
                    if record is None:
                        record = _carry_out(context, stage, folder, fingerprint)
            except BaseException as error:
                if not _is_lost(context.held[0]):  # else, as with the run's own record
                    log.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
                raise
        context.finish(stage, record.output)
        _log_stage(context, stage, log, record, reused)
    took = "already done" if reused else seconds(record.seconds)
    console.say(f"[green]✓[/] [bold]{name:<10}[/] {escape(record.output.summary)} [dim]· {took}[/]")


def _carry_out(context: Context, stage: Stage[Any], folder: str, fingerprint: str) -> Record:
    """Do a stage and record it, unless somebody else has taken the run or the stage over meanwhile."""
    started = time.time()
    with context.named_errors(stage):
        output = stage.run(context, folder)
    release_memory()
    record = Record(
        output=output.model_copy(update={"fingerprint": fingerprint}),
        seconds=time.time() - started,
        artifacts=sorted(_artifacts(output)),
    )
    context.check_fences()
    write_record(context.locations.storage, folder, record)
    return record


def _artifacts(output: StageOutput) -> Iterator[str]:
    """What must be there for the output to be of use: files, and the manifests of committed folders."""
    for path in output.artifacts():
        yield storage.join(path, storage.MANIFEST) if storage.is_committed(path) else path


def _log_stage(context: Context, stage: Stage[Any], log: RunLog, record: Record, reused: bool) -> None:
    if reused and is_finished(log):
        return
    if reused:
        log.start(context.title(stage.name), parent=context.run_key, tags={"minitron.kind": "stage"})
    output = record.output
    stage.record(context, output)
    log.tags({"minitron.reused": reused, "minitron.fingerprint": output.fingerprint, "summary": output.summary})
    shown = {k: v for k, v in dict(output).items() if isinstance(v, str | int) and k not in ("summary", "fingerprint")}
    log.params({k: relative(context.locations.storage, v) if isinstance(v, str) else v for k, v in shown.items()})
    log.metrics({"seconds": record.seconds, **stage.metrics(output)}, step=0)
    log.end("FINISHED")


def is_finished(log: RunLog) -> bool:
    """Whether a record's last word is that its run finished."""
    last = None
    for event, _ in read_events(log.path, 0) if log.path.exists() else ():
        if event and event["event"] in ("start", "end"):
            last = event
    return last is not None and last["event"] == "end" and last["status"] == "FINISHED"


class _Parent:
    """The record that all stages are shown under; opened by the first stage that has something to record."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.log = RunLog(context.locations.spool(context.run_key), context.run_key)
        self.open = False

    def child(self, name: str) -> RunLog:
        log = self.context.log(name)
        if not (is_finished(self.log) and is_finished(log)):
            self.reopen()
        return log

    def reopen(self) -> None:
        if self.open:
            return
        recipe = self.context.recipe
        self.log.start(self.context.run_key, tags={"minitron.kind": "run", "minitron.recipe": recipe.name})
        sizes = {f"target_parameters.{member.model}": member.parameters for member in recipe.family}
        documents = {"separate_documents": separates_documents(recipe)}
        self.log.params({"teacher": recipe.teacher.model, **documents, **sizes})
        self.open = True

    def end(self, status: Any) -> None:
        if self.open:
            self.log.end(status)
            self.open = False
