"""The command `minitron models add`: registers a model that another tool has made from a registered one."""

from __future__ import annotations

from typing import Any

import click

from minitron_platform.cli.options import tracking_options
from minitron_platform.console import Console, echo
from minitron_platform.tracking.variant_tags import KINDS

UNMEASURED_HELP = "Register it without figures; its promotion then needs --force and --reason."


@click.command()
@click.argument("folder", type=click.Path())
@click.option("--as", "name", required=True, metavar="NAME", help="Registered model that it becomes a version of.")
@click.option("--parent", required=True, metavar="MODEL[@ALIAS|/VERSION]", help="Version that it was made from.")
@click.option("--kind", required=True, type=click.Choice(KINDS), help="What was done to the parent.")
@click.option("--alias", default="candidate", show_default=True, help="Alias that the version gets.")
@click.option("--unmeasured", is_flag=True, help=UNMEASURED_HELP)
@tracking_options
def add(locations: Any, folder: str, name: str, parent: str, kind: Any, alias: str, unmeasured: bool) -> None:
    """Register an aligned or quantised variant of a registered model.

    FOLDER is a transformers checkpoint that another tool has written, such as TRL or llm-compressor. It is copied to the
    storage and measured on this machine on the parent's held-out rows and benchmarks, a quantised one after its weights were
    dequantised. `minitron promote` judges it against its parent. Called again, it registers and measures nothing twice.

    \b
    minitron models add ./chat --as smollm2-90m-chat --parent smollm2-90m@champion --kind aligned
    minitron models add ./fp8 --as smollm2-90m-fp8 --parent smollm2-90m/3 --kind quantised
    """
    from minitron_platform.variants.add import add_variant

    added = add_variant(
        locations,
        folder,
        name=name,
        parent=parent,
        kind=kind,
        alias=alias,
        console=Console(),
        unmeasured=unmeasured,
    )
    echo(
        f"{added.name} version {added.version}, {kind} from {added.parent}, is {alias}; its weights are in {added.source}"
    )
    if added.figures is None:
        echo("it was not measured, so that quality gates refuse it", err=True)
    elif added.figures.student.failures:
        echo(f"failed: {', '.join(added.figures.student.failures)}; call it again to measure only these", err=True)
