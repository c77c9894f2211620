"""The commands `minitron models`, which lists the registered models, and `minitron models pull`, which copies their weights."""

from __future__ import annotations

from typing import Any

import click
from rich.markup import escape

from minitron.errors import InputError, NotWritableError
from minitron.storage import redact
from minitron_platform.cli.models_add import add
from minitron_platform.cli.models_delete import delete
from minitron_platform.cli.models_diff import diff
from minitron_platform.cli.models_push import push
from minitron_platform.cli.models_show import show
from minitron_platform.cli.options import UNVERIFIED_HELP, tracking_options
from minitron_platform.console import Console, echo


@click.group(invoke_without_command=True)
@tracking_options
def models(locations: Any) -> None:
    """List the registered models."""
    context = click.get_current_context()
    if context.invoked_subcommand:
        for option in ("storage_path", "tracking_uri"):
            if context.get_parameter_source(option) is click.core.ParameterSource.COMMANDLINE:
                raise InputError("an option before the subcommand", f"write it after {context.invoked_subcommand}")
        return
    from rich.table import Table

    from minitron.evaluation.metrics import KL, LOSS, SPEED
    from minitron_platform.tracking.registry import models as registered

    versions = registered(locations.tracking_uri, locations.storage)
    if not versions:
        echo(f"no models in {redact(locations.tracking_uri)}; `minitron run` registers one")
        return
    table = Table(caption=f"KL to the teacher and held-out loss in {KL.unit}", caption_justify="left")
    for title in ("model", "version", "alias", "parameters", "KL", "loss", "tokens/s"):
        names = title in ("model", "alias")
        table.add_column(title, no_wrap=not names, min_width=8 if names else None)
    for row in versions:
        table.add_row(
            row.name,
            row.version,
            ", ".join(row.aliases),
            f"{row.parameters / 1e6:,.1f}M" if row.parameters else "",
            KL.text(row.heldout_kl) if row.heldout_kl is not None else "",
            LOSS.text(row.heldout_loss) if row.heldout_loss is not None else "",
            "" if row.tokens_per_second is None else SPEED.text(row.tokens_per_second),
        )
    console = Console()
    console.table(table)
    for row in versions:
        aliases = f" ({', '.join(row.aliases)})" if row.aliases else ""
        origin = f", {row.made_from}" if row.made_from else ""
        console.say(escape(f"{row.name} {row.version}{aliases}{origin}: {row.source}"))
        scores = [f"{task} {score}" for task, score in row.tasks.items()]
        console.say(escape("  " + " · ".join([f"registered {row.created:%Y-%m-%d %H:%M}", *scores])))


@models.command()
@click.argument("model", metavar="MODEL[@ALIAS|/VERSION]")
@click.argument("folder", type=click.Path())
@click.option("--version", metavar="N", help="The same as MODEL/VERSION.")
@click.option("--unverified", is_flag=True, help=UNVERIFIED_HELP)
@tracking_options
def pull(locations: Any, model: str, folder: str, version: str | None, unverified: bool) -> None:
    """Copy the weights of a registered model to FOLDER.

    MODEL is such as smollm2-90m@champion, which smollm2-90m alone means too, or smollm2-90m/3. The content of every file is
    compared with what was registered. A copy that was interrupted is resumed.
    """
    from minitron_platform.tracking.moves import CHAMPION
    from minitron_platform.tracking.registry import pull as pull_model

    name, alias = model.rsplit("@", 1) if "@" in model else (model, "")
    name, named = name.rsplit("/", 1) if "/" in name else (name, None)
    if len([given for given in (version, alias, named) if given]) > 1:
        option = f" --version {version}" if version else ""
        raise InputError(f"{model}{option}: more than one alias or version", "give one of them")
    version = version or named
    try:
        pulled = pull_model(
            locations.tracking_uri,
            name,
            folder,
            version=version,
            alias=alias or CHAMPION,
            storage_root=locations.storage,
            unverified=unverified,
        )
    except NotWritableError as error:  # the remedy is another folder, not another --storage
        raise InputError(f"FOLDER {error.problem}", error.remedy) from error
    echo(f"{name} version {pulled}, verified, is in {folder}")


models.add_command(add)
models.add_command(show)
models.add_command(diff)
models.add_command(delete)
models.add_command(push)
