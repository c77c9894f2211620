"""The command `minitron plan`."""

from __future__ import annotations

from typing import Any

import click

from minitron.garbage import collector_off
from minitron_platform.cli.options import recipe_options
from minitron_platform.cli.plan_tables import show_plan
from minitron_platform.console import Console


@click.command()
@recipe_options
@click.option(
    "--address", metavar="ADDRESS", help="Ray cluster of the run, whose nodes are counted. [default: this machine]"
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
    planned = checked_plan(console, loaded, storage_path, tracking_uri, address, cluster)
    show_plan(console, loaded, planned, candidates=True)
    if price is not None and planned.price is None:
        console.say("[yellow]--price: this plan is for no GPUs; --gpus N plans for a cluster[/]")


def checked_plan(
    console: Console,
    recipe: Any,
    storage_path: str | None,
    tracking_uri: str | None,
    address: str | None = None,
    cluster: Any = None,
) -> Any:
    """The plan of a recipe."""
    with console.working("planning"), collector_off():
        from minitron_platform.planning.plan import plan as make_plan

        return make_plan(recipe, storage_path=storage_path, tracking_uri=tracking_uri, address=address, cluster=cluster)
