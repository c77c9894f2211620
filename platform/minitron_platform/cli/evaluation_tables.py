"""Tables of benchmark scores, and samples, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.markup import escape
from rich.table import Table

from minitron.evaluation.metrics import error_note
from minitron.evaluation.result_file import ModelResults
from minitron_platform.cli.short_names import legend, short_names


def score_table(results: Sequence[ModelResults]) -> Table:
    """A row per task with its metric, unit and documents, and a column per model (see `short_names`)."""
    names = short_names([result.model for result in results])
    keys = list(dict.fromkeys(key for result in results for key in (*result.tasks, *result.failures)))
    note = error_note(each.score.stderr for result in results for each in result.tasks.values())
    table = Table(caption="\n".join(filter(None, [*map(escape, legend(names)), note])) or None, caption_justify="left")
    table.add_column("task")
    table.add_column("metric")
    for result in results:
        table.add_column(names[result.model], justify="right")
    table.add_column("measured on")
    for key in keys:
        scores = {names[result.model]: result.tasks[key].score for result in results if key in result.tasks}
        shown = [_value(result, key) for result in results]
        score = next(iter(scores.values()), None)
        lower = " (lower is better)" if score and score.higher_is_better is False else ""
        settings = dict.fromkeys(each.settings for each in scores.values())
        if len(settings) > 1:
            measured_on = "; ".join(f"{model}: {each.settings}" for model, each in scores.items())
        else:
            measured_on = "".join(settings)
        table.add_row(key, f"{score.shown_as.title}{lower}" if score else "", *shown, measured_on)
    return table


def _value(result: ModelResults, key: str) -> str:
    if key not in result.tasks:
        return "failed" if key in result.failures else "not measured"
    return result.tasks[key].score.text


def sample_lines(results: Sequence[ModelResults], longest: int) -> Iterator[str]:
    """The samples of every task and model, as lines with markup. longest: characters of a prompt or answer."""
    for result in results:
        for key, evaluated in result.tasks.items():
            metric = evaluated.score.shown_as
            if not evaluated.samples:
                reason = f"{metric.name} is computed from all documents together, and says nothing about one"
                yield f"\n[bold]{escape(result.model)} · {escape(key)}[/]  no samples: {escape(reason)}"
            for sample in evaluated.samples:
                value = metric.sentence(metric.text(sample.value))
                if sample.is_right is not None:
                    value = "right" if sample.is_right else "wrong"
                yield f"\n[bold]{escape(result.model)} · {escape(key)} {escape(sample.id)}[/]  {value}"
                yield f"[dim]{escape(_end(sample.prompt, longest))}[/]"
                if sample.target:
                    yield from _labelled("expected", _end(sample.target, longest))
                yield from _labelled("answered", _end(sample.answer, longest))
                if sample.extracted is not None:
                    yield from _labelled("extracted", _end(sample.extracted, longest))
                if sample.problem is not None:
                    yield from _labelled("failed", sample.problem)


def _labelled(label: str, text: str) -> Iterator[str]:
    """A text behind its label; one of several lines, such as a program, below it."""
    lines = text.strip("\n").rstrip().split("\n")
    if len(lines) == 1:
        yield f"  {label:<9} {escape(lines[0].strip())}"
        return
    yield f"  {label}"
    yield from (f"    {escape(line)}" for line in lines)


def _end(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"… {text[-longest:]}"
