"""Prints a plan: the cost of its stages, its resources and its candidates."""

from __future__ import annotations

from typing import Any

from rich.markup import escape

from minitron.storage import redact
from minitron_platform.console import Console, seconds

MAX_CANDIDATES = 40  # that a plan lists for each model
MAX_NOTES = 3  # that a plan lists


def show_plan(console: Console, recipe: Any, planned: Any, *, candidates: bool) -> None:
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
    console.say(f"compute  {planned.dtype}{'' if planned.cluster else _speed_text(planned.speed)}")
    console.say(f"resources  {planned.resources_text}")
    console.say(f"documents  {planned.documents_text}")
    for title, memory in planned.memory.items():
        name = title if len(recipe.family) > 1 else title.split()[-1]
        console.say(f"memory   {escape(name)}: {memory}")
    for title, fit in planned.gpu_memory.items():
        name = title if len(recipe.family) > 1 else title.split()[-1]
        console.say(f"each GPU {escape(name)}: {fit.memory}; {fit.settings}")
    for title, node in planned.node_memory.items():
        name = title if len(recipe.family) > 1 else title.split()[-1]
        console.say(f"each node {escape(name)}: {node}")
    chosen = recipe.targets.mode
    for mode, teacher in sorted(planned.teacher_costs.items(), key=lambda item: item[0] != chosen):
        title = f"teacher  {mode}" if mode == chosen else f"  or, with targets.mode={mode}"
        console.say(
            f"{title}: {teacher.rows:,} rows stored, {teacher.bytes / 1e6:,.1f} MB, "
            f"{teacher.stored_flops / 1e12:,.2f} TFLOP; {teacher.online_flops / 1e12:,.2f} TFLOP in the distillation"
        )


def _speed_text(speed: Any) -> str:
    if speed.measured:
        rates = f"{speed.forward / 1e9:,.0f} GFLOP/s in forward passes and {speed.training / 1e9:,.0f} in training"
        return f", on each core {rates}, measured on {speed.measured}"
    assumed = "of which models are assumed to reach half; `minitron doctor --calibrate` measures it"
    return f", {speed.matmul / 1e9:,.0f} GFLOP/s measured on this machine, {assumed}"


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
