"""The command `minitron submit`."""

from __future__ import annotations

import click

from minitron_platform.cli.options import ADDRESS_HELP, INSECURE_HELP, TAKE_OVER_HELP, UPLOAD_HELP, recipe_options
from minitron_platform.cli.program import command_line, program
from minitron_platform.console import echo


@click.command()
@recipe_options
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
        resume=command_line(),
        say=lambda line: echo(line, err=True),
    )
    echo(submission)
    echo(f"follow it: {program()} logs {submission} --address {address} --follow", err=True)
