"""The part of a plan that is about a cluster of GPUs: the time of every stage there, and what it rests on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape

from minitron_platform.console import Console, seconds

if TYPE_CHECKING:
    from minitron_platform.planning.plan import Cost, Plan


def show_cluster_plan(console: Console, planned: Plan) -> None:
    """Print the time of every stage on the plan's cluster, and the assumptions; nothing without a cluster."""
    if planned.cluster is None:
        return
    console.say()
    console.table(_table(planned))
    if planned.price is None:
        console.say(
            "No price: give what a GPU costs for an hour with --price, or resources.price_per_gpu_hour in the recipe."
        )
    console.say("Simulated, not measured. It assumes:")
    for assumption in planned.cluster.assumptions(planned.resources.gpu_memory_bytes, planned.in_fp8):
        console.say(f"  {escape(assumption)}")


def _table(planned: Plan) -> Any:
    from rich.table import Table

    cluster = planned.cluster
    assert cluster is not None
    price = planned.recipe.resources.price_per_gpu_hour
    table = Table(
        title=f"on {cluster.gpus} GPU{'s' if cluster.gpus > 1 else ''}, {cluster.gpus_per_node} per node",
        title_justify="left",
    )
    for title in ("stage", "bounded by"):
        table.add_column(title)
    for title in ("tokens", "time", "GPU-hours", "idle", *(() if price is None else ("price",))):
        table.add_column(title, justify="right", no_wrap=True)
    for cost in planned.costs:
        title = cost.title if len(planned.recipe.family) > 1 else cost.stage
        table.add_row(title, *_row(cost, cluster.gpus, price))
    table.add_section()
    total = [seconds(planned.seconds), f"{planned.gpu_hours:,.1f}", f"{planned.idle_share:.0%}"]
    if planned.price is not None:
        total.append(f"{planned.price:,.2f}")
    tokens = sum(cost.estimate.tokens for cost in planned.costs if not cost.done)
    table.add_row("total", "with the start of the workers", f"{tokens:,}", *total)
    return table


def _row(cost: Cost, gpus: int, price: float | None) -> list[str]:
    """The columns behind the stage's name."""
    tokens = f"{cost.estimate.tokens:,}" if cost.estimate.tokens else ""
    if cost.done:
        return ["", tokens, "already done"]
    hours = cost.seconds * gpus / 3600
    row = [
        escape(cost.bound),
        tokens,
        seconds(cost.seconds),
        f"{hours:,.1f}",
        f"{1 - cost.busy / (cost.seconds * gpus):.0%}" if cost.seconds else "",
    ]
    return row if price is None else [*row, f"{hours * price:,.2f}"]
