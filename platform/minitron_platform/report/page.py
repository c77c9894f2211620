"""The final table of a run, its plots and report.html."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from minitron import storage
from minitron.evaluation import task_metric
from minitron.evaluation.metrics import KL, LOSS, PLUS_MINUS, SPEED, Metric
from minitron.text import printable
from minitron_platform.recipes.build import lm_eval_tasks
from minitron_platform.shipped_files import data_folder
from minitron_platform.stages.context import Context
from minitron_platform.stages.correct import Correct
from minitron_platform.stages.data import Data
from minitron_platform.stages.distill import Distill
from minitron_platform.stages.evaluate import HELDOUT, Evaluate, Figures
from minitron_platform.stages.search import Search
from minitron_platform.stages.search_output import SearchOutput
from minitron_platform.stages.stage import StageOutput
from minitron_platform.stages.state import RunState
from minitron_platform.tracking.restarts import Restart
from minitron_search.ranking import RankedCandidate, pareto
from minitron_search.tau import SETTLED

if TYPE_CHECKING:
    import jinja2

MAX_BARS = 25  # candidates in the plot of a search
STANDING_COLOURS = {"distilled: the winner": "#76b900", "tied with the best": "#b5d99c", "behind": "#9aa5b1"}
# Costs of a ranked candidate that KL is plotted against: field, divisor and label. Latency is only known if it is limited.
COSTS = (
    ("parameters", 1e6, "million parameters"),
    ("flops_per_token", 1e9, "GFLOPs per token"),
    ("memory_bytes", 1e6, "MB of weights and KV cache"),
    ("latency_ms", 1, "ms to the first token"),
)
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
        *((_task_title(task, metric), partial(_score_text, task)) for task, metric in _benchmarks(state).items()),
    ]
    if any(figures.tokens_per_second is not None for _, figures in columns):
        metrics.append((SPEED.unit, _speed_text))
    header = ["", *(title for title, _ in columns)]
    return header, [[name, *[text(figures) for _, figures in columns]] for name, text in metrics]


def _speed_text(figures: Figures) -> str:
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
    return "failed" if score is None else score.shown_as.text(score.value, score.stderr)


def _task_title(task: str, metric: str | None) -> str:
    """Name of a benchmark with its metric and unit; without them if the metric is not known."""
    return f"{task} {task_metric(task, metric).title}" if metric else task


def caption(state: RunState) -> str:
    """Caption of the final table: what the metrics were measured on, and why benchmarks failed."""
    columns = [figures for _, figures in _columns(state)]
    scores = {task: score for figures in columns for task, score in figures.tasks.items()}
    tasks = [
        f"{name}: {score.metric}{' (lower is better)' if score.higher_is_better is False else ''}, {score.settings}"
        for name, score in scores.items()
    ]
    reasons = {task: reason for figures in columns for task, reason in figures.failures.items()}
    failures = [f"{task} failed: {reason}" for task, reason in reasons.items()]
    tokens = f"{columns[-1].heldout_tokens:,} held-out tokens"
    has_errors = any(score.stderr is not None for score in scores.values())
    errors = [f"{PLUS_MINUS} is the standard error"] if has_errors else []
    return " · ".join([f"loss and KL in {KL.unit} on {tokens}", *tasks, *errors, *failures])


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


def write_report(context: Context, run_record: Any) -> Path:
    """Write report.html, report.png and results.json to the run's local folder and to MLflow; returns the folder.

    Does nothing if the report of these results exists. A remote storage gets a copy.
    """
    folder = Path(context.locations.local_run(context.run_key))
    family = {model: _dumped(outputs) for model, outputs in context.family.items()}
    results = {"run": context.run_key, "stages": _dumped(context.shared), "family": family}
    text = json.dumps(results, indent=1, sort_keys=True)
    target = folder / "results.json"
    if not run_record.open and target.exists() and target.read_text() == text and (folder / "report.html").exists():
        return folder
    with context.console.working("report"):
        picture = draw(context)
        storage.write_bytes(str(folder / "report.png"), picture)
        storage.write_bytes(str(folder / "report.html"), page(context).encode())
        storage.write_bytes(str(target), text.encode())
    if not run_record.open:
        run_record.reopen()
    for name in ("report.html", "report.png", "results.json", "recipe.yaml"):
        stored = storage.join(context.locations.run(context.run_key), name)
        if not storage.is_local(context.locations.storage):
            storage.write_bytes(stored, (folder / name).read_bytes())
        run_record.log.artifact(stored)
    return folder


def _dumped(outputs: Mapping[str, StageOutput]) -> dict[str, Any]:
    return {name: output.model_dump(mode="json") for name, output in outputs.items()}


def draw(context: Context) -> bytes:
    """Plots of each model's search and distillation, as a PNG: a bar per candidate, the training curve, and KL against the
    number of parameters, FLOPs, memory and, if it was measured, latency."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        family = context.recipe.family
        shape = (3 * len(family), 2)
        figure, axes = pyplot.subplots(*shape, figsize=(11, 10.8 * len(family)), layout="constrained", squeeze=False)
        for index, member in enumerate(family):
            name = f"{member.model}: " if len(family) > 1 else ""
            ranking = context.output(Search, member).ranking
            (bars, curve), *fronts = axes[3 * index : 3 * index + 3]
            _draw_search(bars, ranking, name)
            tokens_per_step = context.recipe.distillation(member).batch_rows * context.output(Data).seq_length
            table = context.output(Evaluate, member).table
            _draw_distillation(curve, tokens_per_step, context.output(Distill, member).curve, table, name)
            for panel, (cost, unit, label) in zip([p for row in fronts for p in row], COSTS, strict=True):
                if getattr(ranking[0], cost) is not None:
                    _draw_pareto(panel, ranking, cost, unit, label, name)
                else:
                    panel.set_axis_off()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        pyplot.close(figure)
    return buffer.getvalue()


def _colour(candidate: RankedCandidate) -> str:
    winner, tied, behind = STANDING_COLOURS.values()
    return winner if candidate.winner else tied if candidate.tied else behind


def _draw_search(axes: Any, ranking: Sequence[RankedCandidate], name: str) -> None:
    from matplotlib.patches import Patch

    ordered = ranking[:MAX_BARS][::-1]
    positions = range(len(ordered))
    pruned = "#e4e7eb"
    colours = [_colour(candidate) for candidate in ordered]
    axes.barh(positions, [candidate.kl_undistilled for candidate in ordered], color=pruned)
    axes.barh(positions, [candidate.kl for candidate in ordered], color=colours)
    axes.set_yticks(positions, [candidate.architecture.label() for candidate in ordered])
    axes.set_xlabel(f"held-out {KL.title}")
    shown = f"best {len(ordered)} of " if len(ordered) < len(ranking) else ""
    axes.set_title(f"{name}search, {shown}{len(ranking)} candidates", loc="left", fontsize=10)
    legend = {
        LABELS["pruned"]: pruned,
        **{text: colour for text, colour in STANDING_COLOURS.items() if colour in colours},
    }
    patches = [Patch(color=colour, label=text) for text, colour in legend.items()]
    axes.legend(handles=patches, frameon=False, loc="upper left", bbox_to_anchor=(-0.1, -0.14), ncols=4, handlelength=1)


def _draw_pareto(axes: Any, ranking: Sequence[RankedCandidate], cost: str, unit: float, label: str, name: str) -> None:
    """A point per candidate, and a line through those of which no other is better in both KL and cost."""
    costs = [getattr(candidate, cost) / unit for candidate in ranking]
    kl = [candidate.kl for candidate in ranking]
    front = pareto(costs, kl)
    line = [costs[i] for i in front], [kl[i] for i in front]
    axes.plot(*line, color="#52606d", linewidth=1, zorder=1, label="no other is better in both")
    axes.scatter(costs, kl, color=[_colour(candidate) for candidate in ranking], zorder=2)
    axes.set_xlabel(label)
    axes.set_ylabel(f"held-out KL, {KL.unit}")
    axes.set_title(f"{name}KL against {label}", loc="left", fontsize=10)
    axes.legend(frameon=False)


def _draw_distillation(
    axes: Any, tokens_per_step: int, curve_path: str, table: Mapping[str, Figures], name: str
) -> None:
    curve = storage.read_json(curve_path)
    measure, what = ("train_kl", KL.title) if curve["train_kl"] else ("train_loss", f"loss, {LOSS.unit}")
    axes.plot(
        [step * tokens_per_step for step in curve["step"]], curve[measure], color="#76b900", label="training rows"
    )
    for key, style in (("pruned", ":"), ("distilled", "--")) if measure == "train_kl" else ():
        value = table[key].kl
        axes.axhline(value, color="#52606d", linestyle=style, label=f"{LABELS[key]}, held-out rows")
    axes.set_xlabel("tokens")
    axes.set_ylabel(what)
    axes.set_title(f"{name}distillation", loc="left", fontsize=10)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _benchmark(candidate: RankedCandidate, task: str) -> str:
    """A candidate's score on a task; empty if it has none."""
    score = candidate.score(task)
    return "" if score is None else score.shown_as.text(score.value, score.stderr)


def _benchmark_titles(search: SearchOutput) -> dict[str, str]:
    """Title of each benchmark's column."""
    return {task: _task_title(task, search.metrics.get(task)) for task in search.benchmarks}


def serving_text(search: SearchOutput) -> str:
    """A sentence that says what memory and latency of the candidates refer to."""
    serving = search.serving
    sequences = "one sequence" if serving.batch == 1 else f"{serving.batch} sequences"
    text = f"Memory is that of the weights and the KV cache of {sequences} of {serving.context:,} tokens, at 16 bits per value"
    has_latency = search.ranking[0].latency_ms is not None
    return f"{text}; latency is the median time to their first token." if has_latency else f"{text}."


def findings(search: SearchOutput) -> list[str]:
    """Sentences about a search: how early its order was known, and how many steps early stopping saved or would have saved."""
    sentences = []
    if search.forward is not None:
        distilled = sum(candidate.distilled for candidate in search.forward)
        sentences.append(
            f"{len(search.forward)} candidates were scored without training, and {distilled} of them were distilled."
        )
    if search.stopped:
        stopped = len(search.stopped)
        sentences.append(
            f"{stopped} were stopped early at a rung, which saved {search.saved:.0%} of the training steps."
        )
    if len(search.ranking) < 2:
        return sentences
    rows = {row.step: row for row in search.stability if row.measure.startswith("KL")}
    threshold = f"a Kendall's tau of at least {SETTLED:g} with the final order"
    if search.settled is None:
        return [*sentences, f"No earlier measurement has {threshold}: the order was not known before the end."]
    row = rows[search.settled]
    when = f"from step {search.settled} on" if search.settled else "before any training"
    sentences.append(f"The order was known {when} ({threshold}).")
    if not search.stopped:
        sentences.append(
            f"Stopping the worse half at that point would have saved {row.saved:.0%} of the training steps and cost "
            f"{row.regret_kept:.3f} nats per token."
        )
    return sentences


def restarts(state: RunState) -> list[tuple[str, Restart]]:
    """All restarts of the run, with the name of the stage."""
    found = [(Correct.name, restart) for restart in state.output(Correct).restarts]
    for member in state.recipe.family:
        name = f" {member.model}" if len(state.recipe.family) > 1 else ""
        found += [(f"{Search.name}{name}", restart) for restart in state.output(Search, member).restarts]
        found += [(f"{Distill.name}{name}", restart) for restart in state.output(Distill, member).restarts]
    return found


def _shown(value: Any) -> Any:
    # not of what the template itself has made, which is escaped already
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def environment() -> jinja2.Environment:
    """Jinja's settings for the page: every text is escaped, and has no control characters."""
    import jinja2

    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=_shown)


def page(context: Context) -> str:
    """The report as one self-contained HTML page."""
    import base64

    header, body = rows(context)
    template = environment().from_string((data_folder("dashboards") / "report.html.j2").read_text())
    folder = Path(context.locations.local_run(context.run_key))
    searches = {member.model: context.output(Search, member) for member in context.recipe.family}
    return template.render(
        recipe=context.recipe,
        run_key=context.run_key,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        header=header,
        body=body,
        caption=caption(context),
        picture=base64.b64encode((folder / "report.png").read_bytes()).decode(),
        shared=context.shared,
        family=context.family,
        benchmark=_benchmark,
        searches=searches,
        benchmarks={model: _benchmark_titles(search) for model, search in searches.items()},
        serving={model: serving_text(search) for model, search in searches.items()},
        restarts=restarts(context),
        findings={model: findings(search) for model, search in searches.items()},
        origins={m.model: o.model for m in context.recipe.family if (o := context.recipe.origin(m))},
        tracking_uri=storage.redact(context.locations.tracking_uri),
    )
