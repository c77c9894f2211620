"""The command `minitron models show`: one version, where it comes from, and what it was measured at."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click
from rich.markup import escape

from minitron_platform.cli.options import tracking_options
from minitron_platform.console import Console


@click.command()
@click.argument("model", metavar="MODEL[@ALIAS|/VERSION]")
@tracking_options
def show(locations: Any, model: str) -> None:
    """Show a version of MODEL: its lineage, figures, aliases and promotions.

    MODEL alone is its champion, or its newest version if it has none.
    """
    from minitron_platform.gates.judge import PROMOTED_TAG
    from minitron_platform.tracking.client import (
        all_versions,
        open_registry,
        registered_model,
        version_named,
    )
    from minitron_platform.tracking.lineage import described, lineage, title
    from minitron_platform.tracking.registry import listed_location
    from minitron_platform.tracking.version_figures import figures_of, number_in

    with open_registry(locations.tracking_uri) as client:
        version = version_named(client, model)
        aliases = registered_model(client, version.name).aliases
        every = all_versions(client)
    console = Console()
    names = sorted(alias for alias, number in aliases.items() if str(number) == str(version.version))
    console.say(f"[bold]{escape(title(version))}[/]" + escape(f" ({', '.join(names)})" if names else ""))
    console.say(escape(f"weights: {listed_location(version, locations.storage)}"))
    for label, tag in (("recipe", "minitron.recipe"), ("run", "minitron.run"), ("data", "minitron.data")):
        if tag in version.tags:
            console.say(escape(f"{label}: {version.tags[tag]}"))
    if (parameters := number_in(version, "minitron.parameters")) is not None:
        console.say(f"parameters: {parameters:,.0f}")
    _show_figures(console, figures_of(version))
    found = lineage(version, every)
    console.say("\nlineage")
    _show_tree(console, [*found.origins, f"{described(version)}  <- this one"], found.descendants)
    for tag in sorted(version.tags):
        if tag.startswith(PROMOTED_TAG):
            console.say(escape(f"promoted to {tag.removeprefix(PROMOTED_TAG)}: {_promotion(version.tags[tag])}"))


def _show_tree(console: Console, line: Sequence[str], descendants: Sequence[Any]) -> None:
    for depth, name in enumerate(line):
        console.say(escape("   " * (depth - 1) + "└─ " * (depth > 0) + name))
    for descendant in descendants:
        console.say(escape("   " * (len(line) + descendant.generation - 2) + "└─ " + descendant.described))


def _show_figures(console: Console, figures: Any) -> None:
    from rich.table import Table

    from minitron.evaluation.metrics import KL, LOSS, SPEED, error_note
    from minitron.evaluation.scores import score_row

    if figures is None:
        return
    others = {"parent": figures.parent, "teacher": figures.teacher}
    columns = {"version": figures.student, **{name: each for name, each in others.items() if each is not None}}
    note = error_note(score.stderr for each in columns.values() for score in each.tasks.values())
    table = Table(caption=note or None, caption_justify="left")
    for title in ("", *columns):
        table.add_column(title)
    rows = {}
    for metric, name in ((LOSS, "loss"), (KL, "kl"), (SPEED, "tokens_per_second")):
        rows[metric.title] = [_text(metric, getattr(each, name)) for each in columns.values()]
    for task in figures.student.tasks:
        title, texts = score_row(task, [each.tasks.get(task) for each in columns.values()])
        rows[title] = texts
    for name, values in rows.items():
        if any(values):
            table.add_row(name, *values)
    console.table(table)


def _text(metric: Any, value: float | None) -> str:
    return "" if value is None else metric.text(value)


def _promotion(text: str) -> str:
    """Who promoted it, when and why, from a tag that anybody can write."""
    try:
        values = json.loads(text)
        why = f", although gates failed: {values['reason']}" if values.get("forced") else ""
        return f"{values['time']} by {values['by']}{why}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "the record cannot be read"
