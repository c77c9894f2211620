"""The final table of a run: a column per model, a row per metric."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from rich.table import Table

from minitron.evaluation import task_metric
from minitron.evaluation.metrics import KL, SPEED, Metric, error_note
from minitron.evaluation.scores import Score
from minitron_platform.recipes.build import lm_eval_tasks
from minitron_platform.stages.evaluate import HELDOUT, Evaluate, Figures
from minitron_platform.stages.state import RunState

LABELS = {"pruned": "pruned only", "distilled": "distilled"}


def _columns(state: RunState) -> list[tuple[str, Figures]]:
    """Title and metrics of every column: the teacher, then each student before and after its distillation."""
    tables = {member.model: state.output(Evaluate, member).table for member in state.recipe.family}
    columns = [("teacher", next(iter(tables.values()))["teacher"])]
    for model, table in tables.items():
        name = f"{model}\n" if len(tables) > 1 else ""
        columns += [(name + label, table[key]) for key, label in LABELS.items()]
    return columns


def rows(state: RunState) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the final table, as text: a column per model, a row per metric."""
    columns = _columns(state)
    metrics: list[tuple[str, Callable[[Figures], str]]] = [
        ("parameters", lambda figures: f"{figures.parameters:,}"),
        *((_row_title(metric), partial(_heldout_text, field, metric)) for field, metric in HELDOUT.items()),
        *((task_title(task, metric), partial(_score_text, task)) for task, metric in _benchmarks(state).items()),
    ]
    if any(figures.tokens_per_second is not None for _, figures in columns):
        metrics.append((SPEED.unit, speed_text))
    header = ["", *(title for title, _ in columns)]
    return header, [[name, *[text(figures) for _, figures in columns]] for name, text in metrics]


def speed_text(figures: Figures) -> str:
    """Tokens per second; empty if they were not measured."""
    return "" if figures.tokens_per_second is None else SPEED.text(figures.tokens_per_second)


def _row_title(metric: Metric) -> str:
    """Title of a held-out metric, without the unit if the caption has it."""
    return metric.name if metric.unit == KL.unit else metric.title


def _heldout_text(field: str, metric: Metric, figures: Figures) -> str:
    return metric.text(getattr(figures, field))


def _benchmarks(state: RunState) -> dict[str, str | None]:
    """The metric of each of the recipe's benchmarks; None if the benchmark failed for every model."""
    known = {task: score.metric for _, figures in _columns(state) for task, score in figures.tasks.items()}
    return {task.key: known.get(task.key) for task in lm_eval_tasks(state.recipe.evaluate.tasks)}


def _score_text(task: str, figures: Figures) -> str:
    score = figures.tasks.get(task)
    return "failed" if score is None else score.text


def task_title(task: str, metric: str | None) -> str:
    """Name of a benchmark with its metric and unit; without them if the metric is not known."""
    return f"{task} {task_metric(task, metric).title}" if metric else task


def measured_on(score: Score) -> str:
    """A score's metric and what it was measured on: "acc, 5-shot, first 40 of 1,172 documents of test"."""
    return f"{score.metric}{' (lower is better)' if score.higher_is_better is False else ''}, {score.settings}"


def caption(state: RunState) -> str:
    """Caption of the final table: what the metrics were measured on, and why benchmarks failed."""
    columns = [figures for _, figures in _columns(state)]
    scores = {task: score for figures in columns for task, score in figures.tasks.items()}
    tasks = [f"{name}: {measured_on(score)}" for name, score in scores.items()]
    reasons = {task: reason for figures in columns for task, reason in figures.failures.items()}
    failures = [f"{task} failed: {reason}" for task, reason in reasons.items()]
    tokens = f"{columns[-1].heldout_tokens:,} held-out tokens"
    note = error_note(score.stderr for figures in columns for score in figures.tasks.values())
    return " · ".join([f"loss and KL in {KL.unit} on {tokens}", *tasks, *([note] if note else []), *failures])


def final_table(state: RunState) -> Table:
    """The final table, for a terminal."""
    header, body = rows(state)
    table = Table(
        caption=caption(state), caption_justify="left", collapse_padding=True
    )  # so that two models fit into 80 columns
    for index, title in enumerate(header):
        table.add_column(title, justify="left" if index == 0 else "right")
    for row in body:
        table.add_row(*row)
    return table
