"""The command `minitron recipes`."""

from __future__ import annotations

import click

from minitron_platform.console import echo


@click.command()
@click.argument("name", required=False)
def recipes(name: str | None) -> None:
    """List the recipes that ship with Minitron, or print the file of one: minitron recipes minimal > mine.yaml."""
    from minitron_platform.recipes.load import load_recipe, shipped_recipe, shipped_recipes

    if name is not None:
        click.echo(shipped_recipe(name).read_text(encoding="utf-8"), nl=False)
        return
    for each in shipped_recipes():
        echo(f"{each:<28}{load_recipe(each).description}")
