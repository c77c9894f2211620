"""The command `minitron` and its subcommands, except `importance` and `prune`."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from typing import Any

import click
from rich.markup import escape

from minitron import __version__
from minitron.errors import MinitronError, NotWritableError
from minitron.storage import redact
from minitron.text import printable_log
from minitron_platform.cli.importance import importance
from minitron_platform.cli.models import UNVERIFIED_HELP, models
from minitron_platform.cli.options import STORAGE_HELP, TRACKING_HELP, tracking_options
from minitron_platform.cli.prune import prune
from minitron_platform.console import Console, PrintableFormatter, echo, seconds

ADDRESS_HELP = "Address of the cluster's Ray Jobs API: http://HOST:8265."
INSECURE_HELP = "Allow an unencrypted address of another machine."
UPLOAD_HELP = (
    "Copy the recipe's local teacher, texts and benchmarks to the storage first, for nodes that do not have them."
)
TAKE_OVER_HELP = "If another driver is running this recipe, take the run over instead of waiting."
MAX_CANDIDATES = 40  # that a plan lists for each model
MAX_NOTES = 3  # that a plan lists
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Group(click.Group):
    """Prints a MinitronError as problem and fix and exits with code 2. Other exceptions are bugs and keep their traceback."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except NotWritableError as error:
            _fail(type(error)(error.problem, f"{error.remedy}{self._location_option(context)}"))
        except MinitronError as error:
            _fail(error)
        except KeyboardInterrupt:
            echo(f"\nstopped; to resume: {_command_line()}", err=True)
            context.exit(130)

    def _location_option(self, context: click.Context) -> str:
        """End of the remedy for a folder that is not writable: names the option --storage if the command that failed has it."""
        command = self.get_command(context, context.invoked_subcommand or "")
        has_option = command is not None and any(parameter.name == "storage_path" for parameter in command.params)
        return " with --storage" if has_option else ""


def _fail(error: MinitronError) -> None:
    click.secho("error: ", fg="red", bold=True, nl=False, err=True)
    click.echo(error.problem, err=True)
    if error.remedy:
        click.secho("  fix: ", fg="green", bold=True, nl=False, err=True)
        click.echo(error.remedy, err=True)
    raise SystemExit(2)


def _command_line() -> str:
    """The command that the user typed, or typed to submit this job, without secrets in addresses."""
    if resume := os.environ.get("MINITRON_RESUME"):
        return resume
    return shlex.join([*shlex.split(_program()), *map(redact, sys.argv[1:])])


def _program() -> str:
    """The command that starts this program in the user's shell."""
    if shutil.which("minitron"):
        return "minitron"
    if sys.argv[0].endswith("__main__.py"):
        return shlex.join([sys.executable, "-m", "minitron_platform"])
    return shlex.quote(sys.argv[0])


@click.group(cls=_Group, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="minitron")
def main() -> None:
    """Turn one large language model into a family of smaller ones, by pruning and distillation.

    A recipe is a YAML file that describes the teacher, the text, the sizes of the students, the search and the evaluation.
    RECIPE is the path of such a file, or the name of a recipe that ships with Minitron (`minitron recipes` lists them).
    """
    if logging.lastResort:  # prints the warnings of all libraries
        logging.lastResort.setFormatter(PrintableFormatter())


def _recipe_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The recipe argument, with the options of every command that reads one."""
    options = [
        click.argument("recipe"),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Override a key of the recipe: --set distill.steps=50.",
        ),
        click.option("--storage", "storage_path", metavar="PATH", envvar="MINITRON_STORAGE", help=STORAGE_HELP),
        click.option("--tracking-uri", metavar="URI", envvar="MLFLOW_TRACKING_URI", help=TRACKING_HELP),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def _known_stage(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """Check the name of a stage. The stages are imported only here, because they import large libraries."""
    if value is None:
        return None
    from minitron_platform.stages.order import stage_names

    return str(click.Choice(stage_names()).convert(value, option, context))


@main.command()
@click.argument("name", required=False)
def recipes(name: str | None) -> None:
    """List the recipes that ship with Minitron, or print the file of one: minitron recipes minimal > mine.yaml."""
    from minitron_platform.recipes.load import load_recipe, shipped_recipe, shipped_recipes

    if name is not None:
        click.echo(shipped_recipe(name).read_text(encoding="utf-8"), nl=False)
        return
    for each in shipped_recipes():
        echo(f"{each:<28}{load_recipe(each).description}")


@main.command()
@_recipe_options
@click.option(
    "--address", metavar="ADDRESS", help="Ray cluster of the run; `plan` does not connect to it. [default: none]"
)
@click.option("--gpus", type=int, metavar="N", help="Plan for a cluster of N GPUs. [default: the GPUs of this machine]")
@click.option("--gpus-per-node", type=int, default=8, show_default=True, metavar="N", help="GPUs of each of its nodes.")
@click.option("--gpu", default="H100", show_default=True, metavar="NAME", help="Their model: H100, H200, A100, ...")
@click.option(
    "--utilisation",
    type=float,
    default=0.3,
    show_default=True,
    metavar="SHARE",
    help="Share of the FLOP/s in their data sheet that models reach.",
)
@click.option("--price", type=float, metavar="AMOUNT", help="Price of a GPU for an hour, in your currency.")
def plan(
    recipe: str,
    overrides: tuple[str, ...],
    storage_path: str | None,
    tracking_uri: str | None,
    address: str | None,
    gpus: int | None,
    gpus_per_node: int,
    gpu: str,
    utilisation: float,
    price: float | None,
) -> None:
    """Show what RECIPE costs, and check that it can work.

    Lists the stages with their estimated cost, and the candidate architectures of every model. With --gpus, simulates the
    stages on a cluster: how long each takes there, how long the GPUs wait, and what bounds it.
    """
    console = Console()
    if price is not None:
        overrides = (*overrides, f"resources.price_per_gpu_hour={price}")
    cluster = None
    if gpus is not None:
        from minitron_platform.planning.cluster import assumed_cluster

        cluster = assumed_cluster(gpus, gpus_per_node, gpu=gpu, utilisation=utilisation)
    from minitron_platform.recipes.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    planned = _planned(console, loaded, storage_path, tracking_uri, address, cluster)
    _show_plan(console, loaded, planned, candidates=True)


@main.command()
@_recipe_options
@click.option(
    "--address", metavar="ADDRESS", help="Address of a running Ray cluster. [default: a private Ray on this machine]"
)
@click.option("--until", metavar="STAGE", callback=_known_stage, help="Stop after this stage: --until search.")
@click.option("--take-over", is_flag=True, help=TAKE_OVER_HELP)
@click.option("--upload", is_flag=True, help=UPLOAD_HELP)
def run(
    recipe: str,
    overrides: tuple[str, ...],
    storage_path: str | None,
    tracking_uri: str | None,
    address: str | None,
    until: str | None,
    take_over: bool,
    upload: bool,
) -> None:
    """Run RECIPE on this machine. Finished stages are reused, interrupted ones are resumed."""
    import time

    started = time.monotonic()
    console = Console()
    console.say(f"[bold]Minitron {__version__}[/]  {escape(recipe)}")
    from minitron_platform.recipes.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    if upload:
        loaded = _uploaded(console, loaded, storage_path, tracking_uri)
    with console.working("starting"):
        from minitron_platform.pipeline import has_run
        from minitron_platform.pipeline import run as run_pipeline
        from minitron_platform.report.page import final_table

        finished = has_run(loaded, storage_path, tracking_uri, address)
    planned = None
    if not finished:
        planned = _planned(console, loaded, storage_path, tracking_uri, address)
        _show_plan(console, loaded, planned, candidates=False)
    result = run_pipeline(
        loaded,
        storage_path=storage_path,
        tracking_uri=tracking_uri,
        address=address,
        until=until,
        take_over=take_over,
        console=console,
        planned=planned,
    )
    if not result.is_complete:
        return
    console.say()
    console.table(final_table(result.state))
    program = _program()
    options = f" --storage {shlex.quote(storage_path)}" if storage_path else ""
    options += f" --tracking-uri {shlex.quote(redact(tracking_uri))}" if tracking_uri else ""
    students = result.students
    console.say(f"\nThe student{'s' if len(students) > 1 else ''}, as plain transformers checkpoints:")
    for student in students:
        console.say(f"  [bold]{escape(student.path)}[/]")
    console.say(f"The report:\n  [bold]{escape(str(result.report))}[/]")
    console.say(f"Open the experiment in MLflow:\n  [bold]{escape(program + ' ui' + options)}[/]")
    console.say("Promote a student:" if len(students) > 1 else "Promote the student:")
    for student in students:
        arguments = f"{student.model} --version {student.version}"
        console.say(f"  [bold]{escape(f'{program} promote {arguments}{options}')}[/]")
    console.say(f"[dim]total time {seconds(time.monotonic() - started)}[/]")


def _uploaded(console: Console, recipe: Any, storage_path: str | None, tracking_uri: str | None) -> Any:
    """The recipe with its local files copied to the storage."""
    from minitron_platform.locations import resolve_locations
    from minitron_platform.uploads import with_uploads

    root = resolve_locations(storage_path, tracking_uri).storage
    return with_uploads(recipe, root, lambda line: console.say(escape(line)))


def _planned(
    console: Console,
    recipe: Any,
    storage_path: str | None,
    tracking_uri: str | None,
    address: str | None = None,
    cluster: Any = None,
) -> Any:
    """The plan of a recipe."""
    with console.working("planning"):
        from minitron_platform.planning.plan import plan as make_plan

        return make_plan(recipe, storage_path=storage_path, tracking_uri=tracking_uri, address=address, cluster=cluster)


def _show_plan(console: Console, recipe: Any, planned: Any, *, candidates: bool) -> None:
    """Print a plan, with the candidates of every model if `candidates` is set."""
    from minitron_platform.cli.cluster_plan import show_cluster_plan

    console.table(_cost_table(recipe, planned))
    show_cluster_plan(console, planned)
    _show_resources(console, recipe, planned)
    for warning in planned.warnings:
        console.say(f"[yellow]warning  {escape(warning)}[/]")
    console.say()
    for note in planned.notes[:MAX_NOTES]:
        console.say(f"[yellow]note[/]     {escape(note)}")
    if len(planned.notes) > MAX_NOTES:
        console.say(f"[yellow]note[/]     and {len(planned.notes) - MAX_NOTES} similar notes")
    for member in recipe.family if candidates else ():
        _show_candidates(console, recipe, member, planned)


def _cost_table(recipe: Any, planned: Any) -> Any:
    """The stages with their estimated cost; requests if the storage is an object store."""
    from rich.table import Table
    from rich.text import Text

    from minitron import storage

    is_remote = not storage.is_local(planned.locations.storage)
    sizes = " and ".join(f"{member.parameters / 1e6:,.1f}M" for member in recipe.family)
    table = Table(
        title=f"{recipe.name}: {planned.teacher.num_parameters / 1e6:,.1f}M to {sizes}",
        title_justify="left",
    )
    for title, side in (
        ("stage", "left"),
        ("what", "left"),
        ("TFLOP", "right"),
        ("disk", "right"),
        *([("requests", "right")] if is_remote else []),
        ("rough time", "right"),
    ):
        table.add_column(title, justify=side)  # type: ignore[arg-type]
    model = ""
    for cost in planned.costs:
        if cost.model != model and len(recipe.family) > 1:
            table.add_section()
            table.add_row("", Text(cost.model, "bold"))
        model = cost.model
        table.add_row(
            cost.stage,
            cost.estimate.what,
            f"{cost.estimate.flops / 1e12:,.1f}" if cost.estimate.flops else "",
            f"{cost.estimate.bytes / 1e6:,.0f} MB" if cost.estimate.bytes > 1e5 else "",
            *([f"{cost.estimate.requests:,}"] if is_remote else []),
            "already done" if cost.done else seconds(cost.seconds),
        )
    table.add_section()
    table.add_row(
        "",
        "total",
        f"{sum(c.estimate.flops for c in planned.costs) / 1e12:,.1f}",
        f"{planned.bytes / 1e6:,.0f} MB",
        *([f"{planned.requests:,}"] if is_remote else []),
        seconds(planned.seconds),
    )
    return table


def _show_resources(console: Console, recipe: Any, planned: Any) -> None:
    """Print where a run stores its data, and what it computes with."""
    from minitron import storage

    free = f" ({planned.free_bytes / 1e9:,.0f} GB free)" if planned.free_bytes is not None else ""
    requests = "" if storage.is_local(planned.locations.storage) else f" (about {planned.requests:,} requests)"
    console.say(f"storage  {escape(planned.locations.storage)}{free}{requests}")
    console.say(f"mlflow   {escape(redact(planned.locations.tracking_uri))}")
    measured = f", {planned.flops_per_second / 1e9:,.0f} GFLOP/s measured on this machine"
    console.say(f"compute  {planned.dtype}{'' if planned.cluster else measured}")
    console.say(f"resources  {planned.resources_text}")
    console.say(f"documents  {planned.documents_text}")
    for title, memory in planned.memory.items():
        name = title if len(recipe.family) > 1 else title.split()[-1]
        console.say(f"memory   {escape(name)}: {memory}")
    for title, fit in planned.gpu_memory.items():
        name = title if len(recipe.family) > 1 else title.split()[-1]
        console.say(f"each GPU {escape(name)}: {fit.memory}; {fit.settings}")
    chosen = recipe.targets.mode
    for mode, teacher in sorted(planned.teacher_costs.items(), key=lambda item: item[0] != chosen):
        title = f"teacher  {mode}" if mode == chosen else f"  or, with targets.mode={mode}"
        console.say(
            f"{title}: {teacher.rows:,} rows stored, {teacher.bytes / 1e6:,.1f} MB, "
            f"{teacher.stored_flops / 1e12:,.2f} TFLOP; {teacher.online_flops / 1e12:,.2f} TFLOP in the distillation"
        )


def _show_candidates(console: Console, recipe: Any, member: Any, planned: Any) -> None:
    """Print the candidates of one model of the family, the largest first."""
    from rich.table import Table

    from minitron.architecture import axes_present

    candidates = planned.candidates[member.model]
    sampled = " drawn at random (the search samples by score)" if member.model in planned.sampled else ""
    origin = recipe.origin(member)
    condition = f"; the winner for {origin.model} decides which of them remain" if origin else ""
    table = Table(title=f"{member.model}: {len(candidates)} candidates{sampled}{condition}", title_justify="left")
    axes = axes_present(candidates)
    on_cluster = ("trial GPU-h", "distill GPU-h") if planned.cluster else ()
    for title in (*(axis.heading for axis in axes), "parameters", "GFLOP/tok", "cache/tok", *on_cluster):
        table.add_column(title, justify="right", no_wrap=True)
    for architecture in candidates[:MAX_CANDIDATES]:
        table.add_row(
            *(str(getattr(architecture, axis.name)) for axis in axes),
            f"{architecture.num_parameters:,}",
            f"{architecture.flops_per_token(recipe.data.seq_length) / 1e9:.3f}",
            f"{architecture.kv_cache_bytes(1):,} B",
            *(f"{hours:,.2f}" for hours in (planned.candidate_gpu_hours(member, architecture) if on_cluster else ())),
        )
    console.table(table)
    if len(candidates) > MAX_CANDIDATES:
        smallest = f"down to {candidates[-1].num_parameters:,} parameters"
        console.say(f"and {len(candidates) - MAX_CANDIDATES:,} more, {smallest}\n")


@main.command()
@_recipe_options
@click.option("--address", required=True, metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help=ADDRESS_HELP)
@click.option("--insecure", is_flag=True, help=INSECURE_HELP)
@click.option("--take-over", is_flag=True, help=TAKE_OVER_HELP)
@click.option("--upload", is_flag=True, help=UPLOAD_HELP)
def submit(
    recipe: str,
    overrides: tuple[str, ...],
    storage_path: str | None,
    tracking_uri: str | None,
    address: str,
    insecure: bool,
    take_over: bool,
    upload: bool,
) -> None:
    """Run RECIPE as a job on a Ray cluster. The job continues when this terminal is closed."""
    from minitron_platform.recipes.load import load_recipe
    from minitron_platform.submission import submit as submit_recipe

    submission = submit_recipe(
        load_recipe(recipe, overrides),
        address=address,
        storage_path=storage_path,
        tracking_uri=tracking_uri,
        insecure=insecure,
        take_over=take_over,
        upload=upload,
        resume=_command_line(),
        say=lambda line: echo(line, err=True),
    )
    echo(submission)
    echo(f"follow it: {_program()} logs {submission} --address {address} --follow", err=True)


def _job_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command about submitted jobs."""
    for option in (
        click.option("--insecure", is_flag=True, help=INSECURE_HELP),
        click.option("--address", required=True, metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help=ADDRESS_HELP),
    ):
        function = option(function)
    return function


@main.command()
@click.argument("job", required=False)
@_job_options
def status(job: str | None, address: str, insecure: bool) -> None:
    """Show the state of JOB, or of all submitted runs."""
    from minitron_platform.cluster.jobs import status as job_status

    for row in job_status(address, job, insecure=insecure):
        echo(f"{row.submission_id:<48}{row.status:<12}{row.message or ''}")


@main.command()
@click.argument("job")
@click.option("--follow", "-f", is_flag=True, help="Keep printing until the job ends.")
@_job_options
def logs(job: str, follow: bool, address: str, insecure: bool) -> None:
    """Print the output of JOB."""
    from minitron_platform.cluster.jobs import logs as job_logs

    for text in job_logs(address, job, follow, insecure=insecure):
        click.echo(printable_log(text), nl=False)


@main.command()
@click.argument("job")
@_job_options
def stop(job: str, address: str, insecure: bool) -> None:
    """Stop JOB. Submitting the same recipe again resumes it."""
    from minitron_platform.cluster.jobs import status as job_status
    from minitron_platform.cluster.jobs import stop as stop_job

    echo(stop_job(address, job, insecure=insecure))
    if resume := job_status(address, job, insecure=insecure)[0].resume:
        echo(f"to resume: {resume}", err=True)


@main.command()
@tracking_options
def sync(locations: Any) -> None:
    """Send to MLflow the records of runs that it lacks.

    Records are kept in the storage until MLflow has them: those of runs that ended while it did not answer, or whose machine
    was lost, are sent by this command from any machine.
    """
    from minitron_platform.tracking.sync import sync as sync_records

    sent = sync_records(locations, Console())
    click.echo(f"{sent:,} records sent" if sent else "MLflow has all records")


@main.command()
@click.argument("model")
@click.option("--version", metavar="N", help="Version to promote. [default: the one with the alias 'candidate']")
@click.option("--alias", default="champion", show_default=True, help="Alias to move.")
@click.option("--unverified", is_flag=True, help=UNVERIFIED_HELP)
@tracking_options
def promote(locations: Any, model: str, version: str | None, alias: str, unverified: bool) -> None:
    """Point an alias of MODEL at a version.

    The content of its weights is compared first with what was registered.
    """
    from minitron_platform.tracking.registry import promote as promote_model

    _print_promotion(
        promote_model(
            locations.tracking_uri,
            model,
            version=version,
            alias=alias,
            storage_root=locations.storage,
            unverified=unverified,
        )
    )


@main.command()
@click.argument("model")
@click.option("--alias", default="champion", show_default=True, help="Alias to move.")
@tracking_options
def rollback(locations: Any, model: str, alias: str) -> None:
    """Point an alias of MODEL at its previous version.

    The weights of the version are verified first.
    """
    from minitron_platform.tracking.registry import rollback as roll_back

    _print_promotion(roll_back(locations.tracking_uri, model, alias=alias, storage_root=locations.storage))


def _print_promotion(promotion: Any) -> None:
    before = f" (was version {promotion.previous})" if promotion.previous else ""
    echo(f"{promotion.name}@{promotion.alias} is version {promotion.version}{before}")


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=5000, show_default=True, help="Port to listen on.")
@click.option("--insecure", is_flag=True, help="Allow a host that other machines can reach.")
@click.option("--no-auth", is_flag=True, help="Ask for no password: every user of this machine reads your files.")
@tracking_options
def ui(locations: Any, host: str, port: int, insecure: bool, no_auth: bool) -> None:
    """Start MLflow's web interface for the experiments and models.

    The link that it prints contains your password, which is kept in your cache folder.
    """
    from minitron_platform.tracking.flusher import check_exists
    from minitron_platform.tracking.server import serve

    check_exists(locations.tracking_uri)
    raise SystemExit(
        serve(
            locations.tracking_uri,
            locations.local,
            host=host,
            port=port,
            insecure=insecure,
            auth=not no_auth,
            say=echo,
        )
    )


main.add_command(importance)
main.add_command(models)
main.add_command(prune)


if __name__ == "__main__":
    main()
