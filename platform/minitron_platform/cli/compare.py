"""`minitron compare`: which differences between models are real."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import click
from rich.markup import escape
from rich.table import Table

from minitron import storage
from minitron_platform.cli.options import check_out
from minitron_platform.console import Console

if TYPE_CHECKING:
    from minitron.evaluation.comparison import Difference
    from minitron.evaluation.result_file import ModelResults


@click.command()
@click.argument("files", metavar="FILE.json...", nargs=-1, required=True)
@click.option("--tasks", metavar="NAME,...", help="Compare these tasks alone.")
@click.option("--out", metavar="FILE.json", help="Write the differences to this file.")
def compare(files: tuple[str, ...], tasks: str | None, out: str | None) -> None:
    """Compare models on the same documents.

    FILES are those that `minitron evaluate --out` wrote, each with one model or several. All models are compared with the first
    one, or the first one that has the task, on the documents that both answered. A difference is called real if it is
    significant at 5 % after a correction for the number of differences (Holm's); for the others the table says how many
    documents would show a difference of this size.

    \b
    minitron evaluate ./teacher ./student --suite minitron-base --data benchmarks --out both.json
    minitron compare both.json other.json
    """
    from dataclasses import asdict

    from minitron.evaluation.comparison import comparison, setting_notes, with_tasks
    from minitron.evaluation.result_file import read_results
    from minitron_platform.cli.evaluation_tables import score_table
    from minitron_platform.cli.short_names import short_names

    check_out(out)
    results = _named([(path, result) for path in files for result in read_results(path)])
    if tasks is not None:
        results = with_tasks(results, [task.strip() for task in tasks.split(",")])
    compared = comparison(results)
    differences, names = compared.differences, short_names([result.model for result in results])
    console = Console()
    console.table(score_table(results))
    shown = {key: each.score.shown_as for result in results for key, each in result.tasks.items()}
    table = Table(
        title=f"differences to {escape(names[results[0].model])}",
        title_justify="left",
        caption=f"intervals of 95 %, paired by document; real: significant at 5 % after Holm's correction for "
        f"{len(differences)} difference{'s' if len(differences) != 1 else ''}",
        caption_justify="left",
    )
    for title, justify in (("task", "left"), ("model", "left"), ("difference", "right"), ("interval", "right")):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    table.add_column("documents", justify="right")
    table.add_column("verdict")
    for each in differences:
        metric = shown[each.task]
        interval = (
            "" if each.interval is None else f"{metric.text(each.interval[0])} to {metric.text(each.interval[1])}"
        )
        value = f"{'+' if each.value > 0 else ''}{metric.text(each.value)}"
        title = f"{each.task} {metric.title}"
        first = each.reference == results[0].model
        model = names[each.model] if first else f"{names[each.model]}, to {names[each.reference]}"
        table.add_row(title, model, value, interval, f"{each.num_documents:,}", _verdict(each))
    console.table(table)
    for note in [*compared.not_compared, *setting_notes(results)]:
        console.say(f"[yellow]{escape(note)}[/]")
    if out:
        storage.write_json(out, [asdict(each) | {"is_real": each.is_real} for each in differences])
        console.say(f"written to [bold]{escape(out)}[/]")


def _named(read: list[tuple[str, ModelResults]]) -> list[ModelResults]:
    """The results, each with a name of its own: models of one name are told apart by their file, or by a number."""
    names = Counter(result.model for _, result in read)
    named: list[ModelResults] = []
    seen: Counter[str] = Counter()
    for path, result in read:
        name = result.model if names[result.model] == 1 else f"{result.model} ({path})"
        seen[name] += 1
        named.append(replace(result, model=name if seen[name] == 1 else f"{name} #{seen[name]}"))
    return named


def _verdict(difference: Difference) -> str:
    if difference.is_real:
        return "real"
    if difference.adjusted is None:
        return "unknown: one document, or one group of them"
    if difference.unreachable:
        return "not shown, and not by more documents: the benchmark's tasks differ too much"
    if difference.needed is None:
        return f"none on these {difference.num_documents:,}"
    needed = f"about {difference.needed:,} documents would settle it"
    available = difference.num_available
    if available is not None and difference.needed > available:
        needed += f"; the benchmark has {available:,}"
    return f"not shown: {needed}"
