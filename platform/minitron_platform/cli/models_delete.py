"""The command `minitron models delete`: removes a version from the registry."""

from __future__ import annotations

from typing import Any

import click

from minitron.errors import InputError
from minitron_platform.cli.options import tracking_options
from minitron_platform.console import echo


@click.command()
@click.argument("model", metavar="MODEL/VERSION")
@click.option("--yes", is_flag=True, help="Do not ask.")
@tracking_options
def delete(locations: Any, model: str, yes: bool) -> None:
    """Remove a version from the registry, after saying which aliases and descendants it has.

    Its weights stay where they are. Aliases that point at it are removed with it; `minitron rollback` points one that
    was promoted at the version before.
    """
    from minitron_platform.tracking.alias_history import moves_of
    from minitron_platform.tracking.client import (
        all_versions,
        open_registry,
        registered_model,
        version_named,
    )
    from minitron_platform.tracking.lineage import lineage, title
    from minitron_platform.tracking.moves import previous_version
    from minitron_platform.tracking.registry import listed_location

    if "/" not in model:
        raise InputError(f"{model!r} does not say which version to delete", f"give it as {model.partition('@')[0]}/3")
    with open_registry(locations.tracking_uri) as client:
        version = version_named(client, model)
        registered = registered_model(client, version.name)
        pointing = sorted(alias for alias, number in registered.aliases.items() if str(number) == str(version.version))
        every = all_versions(client)
        numbers = {str(each.version) for each in every if each.name == version.name}
        number = str(version.version)
        earlier = {alias: previous_version(moves_of(registered, alias), number, numbers) for alias in pointing}
        name = title(version)
        for alias in pointing:
            echo(f"the alias {alias!r} points at {name} and will be removed")
        for descendant in lineage(version, every).descendants:
            if descendant.generation == 1:
                echo(f"{descendant.title} was made from {name} and will name a parent that is not registered")
        if not yes and not click.confirm(f"delete {name} from the registry?"):
            echo("nothing was deleted")
            return
        client.delete_model_version(version.name, str(version.version))
    echo(f"{name} is deleted; its weights are still in {listed_location(version, locations.storage)}")
    for alias in pointing:
        if earlier[alias]:
            option = "" if alias == "champion" else f" --alias {alias}"
            echo(f"to point {alias!r} at version {earlier[alias]} as before: minitron rollback {version.name}{option}")
