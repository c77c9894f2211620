"""The command `minitron submit`."""

from __future__ import annotations

from typing import Any

import click

from minitron.storage import redact
from minitron_platform.cli.job_output import follow_job
from minitron_platform.cli.options import ADDRESS_HELP, INSECURE_HELP, TAKE_OVER_HELP, UPLOAD_HELP, recipe_options
from minitron_platform.cli.program import command_line, program
from minitron_platform.console import echo
from minitron_platform.stopping import INTERRUPTED

ENV_HELP = (
    "Where the job's packages come from. image: the cluster's nodes have them. uv: those that they lack are installed for the "
    "job, in the versions that this machine has. Both check the cluster's Ray, Python and packages before anything is "
    "submitted. as-is: no check."
)


@click.command()
@recipe_options
@click.option("--address", required=True, metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help=ADDRESS_HELP)
@click.option("--insecure", is_flag=True, help=INSECURE_HELP)
@click.option("--take-over", is_flag=True, help=TAKE_OVER_HELP)
@click.option("--upload", is_flag=True, help=UPLOAD_HELP)
@click.option("--env", type=click.Choice(["image", "uv", "as-is"]), default="image", show_default=True, help=ENV_HELP)
@click.option(
    "--driver-cpus",
    type=click.FloatRange(0),
    default=0,
    metavar="N",
    help="CPUs that the run's own process reserves. [default: none, on the cluster's head]",
)
@click.option(
    "--driver-memory",
    type=click.FloatRange(0),
    default=0,
    metavar="GB",
    help="Memory that it reserves. [default: none]",
)
@click.option(
    "--follow",
    "-f",
    is_flag=True,
    help="Print the run's output until it ends, and exit as it does: 0 if it succeeded, 130 if it was stopped.",
)
def submit(
    recipe: str,
    overrides: tuple[str, ...],
    storage_path: str | None,
    tracking_uri: str | None,
    address: str,
    insecure: bool,
    take_over: bool,
    upload: bool,
    env: Any,
    driver_cpus: float,
    driver_memory: float,
    follow: bool,
) -> None:
    """Run RECIPE as a job on a Ray cluster. The job continues when this terminal is closed."""
    from minitron_platform.recipes.load import load_recipe
    from minitron_platform.submission import submit as submit_recipe

    try:
        submission = submit_recipe(
            load_recipe(recipe, overrides),
            address=address,
            storage_path=storage_path,
            tracking_uri=tracking_uri,
            insecure=insecure,
            take_over=take_over,
            upload=upload,
            env=env,
            driver_cpus=driver_cpus,
            driver_memory=int(driver_memory * 1e9),
            resume=command_line(),
            say=lambda line: echo(line, err=True),
        )
    except KeyboardInterrupt:
        echo(f"\ninterrupted; whether the run was submitted: {program()} jobs --address {redact(address)}", err=True)
        raise SystemExit(INTERRUPTED) from None
    echo(submission)
    if follow:
        raise SystemExit(follow_job(address, submission, insecure=insecure))
    echo(f"follow it: {program()} logs {submission} --address {address} --follow", err=True)
