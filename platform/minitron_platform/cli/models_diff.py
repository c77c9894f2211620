"""The command `minitron models diff`: what two versions differ in."""

from __future__ import annotations

import json
from typing import Any

import click

from minitron_platform.cli.options import tracking_options
from minitron_platform.console import Console, echo


@click.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@tracking_options
def diff(locations: Any, first: str, second: str) -> None:
    """Show what two versions differ in: architecture, recipe and figures.

    A and B are such as smollm2-90m@champion and smollm2-90m/3. Differences of figures have 95 % intervals where the results of
    every document are in the storage.
    """
    from rich.markup import escape
    from rich.table import Table

    from minitron_platform.tracking.client import open_registry, version_named
    from minitron_platform.tracking.lineage import title

    with open_registry(locations.tracking_uri) as client:
        versions = [version_named(client, reference) for reference in (first, second)]
    names = [title(version) for version in versions]
    table = Table()
    for heading in ("", *names, "difference"):
        table.add_column(heading)
    sides = [_settings(version, locations.storage) for version in versions]
    changed = [key for key in {**sides[0], **sides[1]} if sides[0].get(key) != sides[1].get(key)]
    for key in changed:
        table.add_row(key, sides[0].get(key, ""), sides[1].get(key, ""), "")
    measured = _figures(versions, locations.storage)
    for row in measured:
        table.add_row(*row)
    if not changed and not measured:
        echo(f"nothing that is recorded differs between {names[0]} and {names[1]}")
        return
    console = Console()
    console.table(table)
    for sentence in _measured_on(versions):
        console.say(escape(sentence))


def _settings(version: Any, storage_root: str) -> dict[str, str]:
    """Architecture and recipe of a version, by dotted key."""
    values: dict[str, str] = {}
    for tag in ("minitron.architecture", "minitron.losses"):
        try:
            values |= _flat(json.loads(version.tags.get(tag, "{}")), tag.removeprefix("minitron."))
        except ValueError:
            values[tag] = version.tags[tag]
    for tag in ("parameters", "tokens", "teacher", "teacher_corrected", "cut_from", "kind", "data", "version"):
        if (text := version.tags.get(f"minitron.{tag}")) is not None:
            values[tag] = f"{int(text):,}" if text.isdecimal() else text
    return values | _flat(_recipe(version, storage_root), "recipe")


def _recipe(version: Any, storage_root: str) -> Any:
    """The recipe of a version's run; nothing if it is not in the storage."""
    import yaml

    from minitron import storage
    from minitron.errors import MinitronError
    from minitron.names import check_name

    run = version.tags.get("minitron.run")
    if run is None:
        return {}
    try:
        path = storage.join(storage_root, "runs", check_name(run, f"version {version.version}"), "recipe.yaml")
        data = storage.read_bytes_if_exists(path)
        return {} if data is None else yaml.safe_load(data)
    except (MinitronError, yaml.YAMLError) as error:
        echo(f"the recipe of version {version.version} of {version.name} cannot be read: {error}", err=True)
        return {}


def _flat(value: Any, key: str) -> dict[str, str]:
    """The leaves of nested mappings and lists as text, by dotted key."""
    if isinstance(value, dict) and value:
        return {name: text for part, inner in value.items() for name, text in _flat(inner, f"{key}.{part}").items()}
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        return {name: text for part, inner in enumerate(value) for name, text in _flat(inner, f"{key}.{part}").items()}
    return {} if value == {} else {key: json.dumps(value, default=str)}


def _measured_on(versions: list[Any]) -> list[str]:
    """What ± is, and what the benchmark scores of both versions were measured on: a sentence for each task, or two if they
    differ."""
    from minitron.evaluation.metrics import error_note
    from minitron_platform.tracking.lineage import title
    from minitron_platform.tracking.version_figures import figures_of

    first, second = (figures_of(version) for version in versions)
    if first is None or second is None:
        return []
    note = error_note(score.stderr for each in (first, second) for score in each.student.tasks.values())
    sentences = [f"{note}; of a difference, in brackets, half the interval of 95 %"] if note else []
    for task in (task for task in first.student.tasks if task in second.student.tasks):
        settings = [each.student.tasks[task].settings for each in (first, second)]
        if settings[0] == settings[1]:
            sentences.append(f"{task}: {settings[0]}")
        else:
            sentences += [f"{task} of {title(v)}: {text}" for v, text in zip(versions, settings, strict=True)]
    return sentences


def _figures(versions: list[Any], storage_root: str) -> list[tuple[str, ...]]:
    from minitron.evaluation.metrics import KL, LOSS, SPEED
    from minitron_platform.gates.documents import read_documents
    from minitron_platform.gates.paired import worse_rows, worse_task
    from minitron_platform.tracking.version_figures import figures_of

    both = [figures_of(version) for version in versions]
    first, second = both
    if first is None or second is None:
        return []
    documents = [read_documents(storage_root, each.student.documents) for each in (second, first)]
    rows: list[tuple[str, ...]] = []
    for name, metric in (("loss", LOSS), ("kl", KL), ("tokens_per_second", SPEED)):
        old, new = getattr(first.student, name), getattr(second.student, name)
        if old is None or new is None:
            continue
        difference = ""
        if metric is not SPEED:
            same = first.heldout is not None and first.heldout == second.heldout
            difference = worse_rows(name, new, old, *documents).text(metric) if same else "on other rows"
        rows.append((metric.title, metric.text(old), metric.text(new), difference))
    for task in (task for task in first.student.tasks if task in second.student.tasks):
        old_score, new_score = first.student.tasks[task], second.student.tasks[task]
        worse = worse_task(task, new_score, old_score, *documents)
        texts = [score.text for score in (old_score, new_score)]
        rows.append(
            (
                f"{task} {new_score.shown_as.title}",
                *texts,
                "not comparable" if worse is None else worse.text(new_score.shown_as),
            )
        )
    return rows
