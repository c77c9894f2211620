"""One recipe carried out: every stage in order, each done once and recognised by its fingerprint afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.markup import escape

from minitron import storage
from minitron.errors import InputError, StorageError
from minitron_platform import stages
from minitron_platform.cluster.ray_start import RayStart
from minitron_platform.cluster.room import joins_cluster
from minitron_platform.console import Console, seconds
from minitron_platform.fence import Fence, LeaseLostError
from minitron_platform.leases import lease
from minitron_platform.recipes.load import recipe_yaml
from minitron_platform.recipes.resources import ResolvedResources
from minitron_platform.recipes.schema import Member, Recipe
from minitron_platform.stages.context import Context, Places, places
from minitron_platform.stages.stage_records import read_record, relative, write_record
from minitron_platform.tracking.flusher import Flusher
from minitron_platform.tracking.spool import RunLog, read_events

# Stages that compute for a while in this process, when one of those that need Ray comes next.
BEFORE_RAY = (stages.MEMBER[0], stages.TARGETS)
FIRST_ON_RAY = stages.MEMBER[1]


def run(
    recipe: Recipe,
    *,
    storage_path: str | None = None,
    tracking_uri: str | None = None,
    address: str | None = None,
    until: str | None = None,
    take_over: bool = False,
    console: Console | None = None,
) -> Context:
    """Carry out `recipe`, doing only what is not done yet; returns the finished run: `shared` has the outputs of the stages
    that the family shares, `family` those of each model's own.

    storage_path: any fsspec path (default ./runs or MINITRON_STORAGE). tracking_uri: MLflow's (default SQLite inside the
    storage). address: a running Ray cluster (default: Ray starts in this process). until: the last stage to do, of the
    family's first model where each has its own. take_over: if another driver carries out this run, take it from there instead
    of waiting for it to end.
    Killed at any point and called again, it goes on from the last finished stage, trial or checkpoint.
    Raises LeaseLostError when another driver took the run over, MinitronError for what the user can change.
    """
    if until is not None and until not in stages.NAMES:
        raise InputError(f"until: {until!r} is not a stage", f"use one of {', '.join(stages.NAMES)}")
    console = console or Console()
    where = places(storage_path, tracking_uri)
    key = run_key(recipe)
    with _alone(where, key, console, take_over) as fence, _closing(console) as stack:
        storage.write_bytes(storage.join(where.local_run(key), "recipe.yaml"), recipe_yaml(recipe).encode())
        flusher = stack.enter_context(Flusher(where.spool(key), where.tracking_uri, recipe.experiment))
        ray = RayStart(stack, address, storage.join(where.local_run(key), "logs"))
        context = Context(
            recipe=recipe,
            places=where,
            console=console,
            run_key=key,
            held=[fence],
            start_ray=ray.need,
            mlflow_run=lambda record: flusher.wait_for(record, timeout=30),
        )
        parent = _Parent(context)
        # a cluster without room is refused before the first stage that has work, not at the first that needs Ray
        needed = until is None or stages.NAMES.index(until) >= stages.NAMES.index(FIRST_ON_RAY)

        def before_work(name: str) -> None:
            if joins_cluster(address):
                context.need_ray()
            elif needed and name in BEFORE_RAY:
                ray.ahead(context)

        try:
            for name, member in steps(recipe):
                context.current = member
                _stage(context, name, parent, before_work)
                if name == until:
                    break
            else:
                _report(context, parent)
        except BaseException as error:
            if not _is_lost(fence):  # else the record belongs to the driver that goes on with it
                parent.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        parent.end("FINISHED")
    return context


@contextmanager
def _alone(where: Places, key: str, console: Console, take_over: bool) -> Iterator[Fence]:
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


def steps(recipe: Recipe) -> Iterator[tuple[str, Member | None]]:
    """Every stage in order, with the model of the family that it is for."""
    yield from ((name, None) for name in stages.BEFORE)
    for place, member in enumerate(recipe.family):
        for name in stages.MEMBER:
            yield name, member
            if place == 0 and name == stages.MEMBER[0]:
                yield stages.TARGETS, None


def _report(context: Context, parent: _Parent) -> None:
    from minitron_platform.report.page import write_report

    write_report(context, parent)
    if parent.open:
        for model, done in context.family.items():
            prefix = f"{model}." if len(context.family) > 1 else ""
            values = _table_metrics(done["evaluate"])
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


def run_key(recipe: Recipe) -> str:
    """The name of a run: the recipe's, and the fingerprint of all it says except how it is spread over machines."""
    content = recipe.model_dump(by_alias=True, exclude={"resources", "description"})
    if recipe.data.bos is None:
        del content["data"]["add_bos"]  # a key that came later: runs made before keep their names
    return f"{recipe.name}-{storage.fingerprint(content)[:8]}"


def stage_fingerprint(context: Context, name: str) -> str:
    """Content address of a stage's result; needs the outputs of the stages before it."""
    stage = stages.load(name)
    return storage.fingerprint({"stage": name, "version": stage.VERSION, "inputs": stage.inputs(context)})


def finished_record(context: Context, name: str, folder: str) -> dict[str, Any] | None:
    """What a finished stage recorded, if all that it made is still there."""
    record = read_record(context.places.storage, folder)
    if record is None:
        return None
    gone = [p for p in record["artifacts"] if not storage.exists(p)]
    if gone:
        context.console.say(f"  [yellow]{escape(gone[0])} is gone: making it again[/]")
        return None
    holds = getattr(stages.load(name), "holds", None)
    return record if holds is None or holds(context, record["outputs"]) else None


def finished_stages(recipe: Recipe, where: Places) -> tuple[Context, int]:
    """What is already done of `recipe` in `where`, as far as it can be known without doing any, and the bytes that the next
    stage has already written."""
    context = Context(
        recipe=recipe,
        places=where,
        console=Console(),
        run_key=run_key(recipe),
        start_ray=_no_ray,
        mlflow_run=lambda key: None,
    )
    for name, member in steps(recipe):
        context.current = member
        folder = where.stage(name, stage_fingerprint(context, name))
        record = finished_record(context, name, folder)
        if record is None:
            return context, storage.size(folder)
        context.finish(name, record["outputs"])
    return context, 0


def _no_ray(context: Context) -> ResolvedResources:
    raise AssertionError("what is only looked at needs no Ray")


def _stage(context: Context, name: str, parent: _Parent, before_work: Callable[[str], None]) -> None:
    console = context.console
    if name == stages.MEMBER[0] and len(context.recipe.family) > 1:
        origin = context.recipe.origin(context.member)
        console.say(f"[bold]{escape(context.member.model)}[/], cut from {origin.model if origin else 'the teacher'}")
    with console.working(f"[bold]{name}[/]"):
        fingerprint = stage_fingerprint(context, name)
        folder = context.places.stage(name, fingerprint)
        record = finished_record(context, name, folder)
        reused = record is not None
        log = parent.child(name)
        if record is None:
            before_work(name)
            log.start(context.title(name), parent=context.run_key, tags={"minitron.kind": "stage"})
            try:
                with context.lease(f"{name}-{fingerprint}", f"stage {name}"):
                    record = finished_record(context, name, folder)  # by another run that was waited for
                    reused = record is not None
                    if record is None:
                        record = _carry_out(context, name, folder, fingerprint)
            except BaseException as error:
                if not _is_lost(context.held[0]):  # else, as with the run's own record
                    log.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
                raise
        context.finish(name, record["outputs"])
        _log_stage(context, name, log, record, reused)
    summary = escape(record["outputs"]["summary"])
    took = "already done" if reused else seconds(record["seconds"])
    console.say(f"[green]✓[/] [bold]{name:<10}[/] {summary} [dim]· {took}[/]")


def _carry_out(context: Context, name: str, folder: str, fingerprint: str) -> dict[str, Any]:
    """Do a stage and record it, unless somebody else has taken the run or the stage over meanwhile."""
    started = time.time()
    outputs = stages.load(name).run(context, folder)
    record = {
        "outputs": {**outputs, "fingerprint": fingerprint},
        "seconds": time.time() - started,
        "artifacts": sorted(_artifacts(outputs)),
    }
    context.check_fences()
    write_record(context.places.storage, folder, record)
    return record


def _artifacts(outputs: dict[str, Any]) -> Iterator[str]:
    """What must be there for the outputs to be of use: files, and the manifests of committed folders."""
    for value in outputs.values():
        if isinstance(value, str) and "/" in value and storage.exists(value):
            yield storage.join(value, storage.MANIFEST) if storage.is_committed(value) else value


def _log_stage(context: Context, name: str, log: RunLog, record: dict[str, Any], reused: bool) -> None:
    if reused and is_finished(log):
        return
    if reused:
        log.start(context.title(name), parent=context.run_key, tags={"minitron.kind": "stage"})
    if record_more := getattr(stages.load(name), "record", None):
        record_more(context, record["outputs"])
    outputs = record["outputs"]
    log.tags({"minitron.reused": reused, "minitron.fingerprint": outputs["fingerprint"], "summary": outputs["summary"]})
    shown = {k: v for k, v in outputs.items() if isinstance(v, str | int) and k not in ("summary", "fingerprint")}
    log.params({k: relative(context.places.storage, v) if isinstance(v, str) else v for k, v in shown.items()})
    log.metrics({"seconds": record["seconds"], **_table_metrics(outputs)}, step=0)
    log.end("FINISHED")


def _table_metrics(outputs: dict[str, Any]) -> dict[str, float]:
    values: dict[str, float] = {}
    for model, row in outputs.get("table", {}).items():
        values |= {f"{model}.{k}": row[k] for k in ("loss", "kl", "top1_agreement", "parameters", "tokens_per_second")}
        for task, score in row["tasks"].items():
            name = f"{model}.{task}.{score['metric']}"
            values |= {name: score["value"]} | (
                {f"{name}_stderr": score["stderr"]} if score["stderr"] is not None else {}
            )
    return values


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
        self.log = RunLog(context.places.spool(context.run_key), context.run_key)
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
        self.log.params({"teacher": recipe.teacher.model, **sizes})
        self.open = True

    def end(self, status: Any) -> None:
        if self.open:
            self.log.end(status)
            self.open = False
