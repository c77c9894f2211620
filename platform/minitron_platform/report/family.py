"""Charts of a family: its models' quality against their size and cost, and their benchmarks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from minitron.architecture import Architecture
from minitron.evaluation.metrics import Metric, error_note, task_metric
from minitron.evaluation.scores import Score
from minitron_platform.report.charts import INK, QUIET, Chart, Mark, Row, Spec, colour, colours, number, one_view, view
from minitron_platform.report.final_table import measured_on
from minitron_platform.report.published import PUBLISHED, sources
from minitron_platform.stages.data import Data
from minitron_platform.stages.distill import Distill
from minitron_platform.stages.evaluate import HELDOUT, Evaluate, Figures
from minitron_platform.stages.state import RunState
from minitron_platform.stages.teacher import Teacher
from minitron_search.ranking import pareto

TEACHER, PRUNED, DISTILLED = "teacher", "pruned only", "distilled"
COSTS = (
    ("size", "million parameters"),
    ("compute", "GFLOPs per token"),
    ("cache", "KB of KV cache per token"),
    ("time", "ms per token, measured"),
)


@dataclass(frozen=True)
class FamilyModel:
    """A model of a chart: the teacher, or a student before or after its distillation."""

    name: str
    state: str
    """TEACHER, PRUNED or DISTILLED."""
    figures: Figures
    architecture: Architecture
    seq_length: int

    def costs(self) -> list[float | None]:
        """Its costs, in the order of COSTS; None for what was not measured."""
        speed = self.figures.tokens_per_second
        return [
            self.figures.parameters / 1e6,
            self.architecture.flops_per_token(self.seq_length) / 1e9,
            self.architecture.kv_cache_bytes(1) / 1e3,
            None if speed is None else 1e3 / speed,
        ]


def family_models(state: RunState, run: str = "") -> Iterator[FamilyModel]:
    """The teacher, then each student pruned and distilled. run: in front of the names, if several runs are compared."""
    seq_length = state.output(Data).seq_length
    prefix = f"{run} " if run else ""
    for number_of_model, member in enumerate(state.recipe.family):
        table = state.output(Evaluate, member).table
        if number_of_model == 0:
            teacher = state.output(Teacher).architecture
            yield FamilyModel(f"{prefix}teacher", TEACHER, table["teacher"], teacher, seq_length)
        student = state.output(Distill, member).architecture
        yield FamilyModel(prefix + member.model, PRUNED, table["pruned"], student, seq_length)
        yield FamilyModel(prefix + member.model, DISTILLED, table["distilled"], student, seq_length)


def names_of(models: Sequence[FamilyModel]) -> list[str]:
    """The names of models, each once, in order."""
    return list(dict.fromkeys(model.name for model in models))


def quality_chart(models: Sequence[FamilyModel]) -> Chart:
    """Quality against cost, with a line through the models that no other one beats in both.

    Published models appear where a benchmark was scored with as many examples in the prompt as theirs.
    """
    qualities = list(_qualities(models))
    rows: list[Row] = []
    for model in models:
        row: Row = {"name": model.name, "state": model.state, "label": _label(model)}
        row |= {f"c{index}": cost for index, cost in enumerate(model.costs())}
        for index, quality in enumerate(qualities):
            value, low, high = quality.of(model.figures)
            row |= {f"q{index}": value, f"low{index}": low, f"high{index}": high}
            if (score := quality.score_of(model.figures)) is not None:
                row |= {f"t{index}": score.text, f"on{index}": score.settings}
        rows.append(row)
    published = list(_published(qualities))
    rows += published
    of = _colours(models)
    colour_of = colours(list(of), chosen=of)
    best = [row for row in rows if row["state"] in (TEACHER, DISTILLED)]
    views: dict[tuple[str, ...], Spec] = {}
    for index, quality in enumerate(qualities):
        sign = -1 if quality.metric.higher_is_better else 1
        for cost, (what, title) in enumerate(COSTS):
            if any(row[f"c{cost}"] is None for row in best):
                continue
            on_front = f"f{index}{cost}"
            scored = [row for row in best if not math.isnan(row[f"q{index}"])]
            for place in pareto([row[f"c{cost}"] for row in scored], [sign * row[f"q{index}"] for row in scored]):
                scored[place][on_front] = True
            views[quality.title, what] = _quality_view(colour_of, index, quality, cost, title, on_front)
    legend = _legend(of)
    if published:
        legend.append(Mark("published", INK))
    switches = {
        "Quality": tuple(quality.title for quality in qualities),
        "against": tuple(dict.fromkeys(what for _, what in views)),
    }
    return Chart("quality", "Quality against size and cost", rows, views, switches, tuple(legend))


@dataclass(frozen=True)
class _Quality:
    """A metric of the held-out rows, or of a benchmark if `task` is not empty."""

    title: str
    metric: Metric
    field: str
    task: str = ""
    score: Score | None = None
    """The first one on the benchmark."""

    def of(self, figures: Figures) -> tuple[float, float, float]:
        """A model's value, and the ends of its error bar, in the metric's unit; NaN if there is none."""
        if not self.task:
            value = self.metric.scale * getattr(figures, self.field)
            return value, value, value
        score = self.score_of(figures)
        if score is None:
            return math.nan, math.nan, math.nan
        return self.metric.scale * score.value, *self.metric.span(score.value, score.stderr)

    def score_of(self, figures: Figures) -> Score | None:
        """A model's score; None of a metric of the held-out rows."""
        return figures.tasks.get(self.task) if self.task else None


def _qualities(models: Sequence[FamilyModel]) -> Iterator[_Quality]:
    for name, metric in HELDOUT.items():
        yield _Quality(metric.name, metric, name)
    scores = {task: score for model in models for task, score in model.figures.tasks.items()}
    for task, score in scores.items():
        metric = task_metric(task, score.metric)
        yield _Quality(f"{task} {metric.name}", metric, "", task, score)


def _published(qualities: Sequence[_Quality]) -> Iterator[Row]:
    """Published models with their scores on the benchmarks of `qualities`."""
    for model in PUBLISHED:
        row: Row = {"name": model.name, "state": "published", "label": model.name, "c0": model.parameters / 1e6}
        for index, quality in enumerate(qualities):
            own = quality.score
            score = None if own is None else model.score(own.task, own.num_fewshot)
            if own is not None and score is not None:
                row |= {f"q{index}": quality.metric.scale * score, f"t{index}": quality.metric.text(score)}
                row[f"on{index}"] = f"{own.num_fewshot}-shot, not run here"
        if len(row) > 4:
            yield row


def _label(model: FamilyModel) -> str:
    return model.name if model.state == TEACHER else f"{model.name}, {model.state}"


def _colours(models: Sequence[FamilyModel]) -> dict[str, str]:
    """A colour for each model, by name; a teacher has that of the text."""
    students = names_of([model for model in models if model.state != TEACHER])
    return dict.fromkeys(names_of(models), INK) | {name: colour(index) for index, name in enumerate(students)}


def _legend(of: Mapping[str, str]) -> list[Mark]:
    return [*(Mark(name, chosen) for name, chosen in of.items()), Mark(PRUNED, QUIET, hollow=True)]


def _quality_view(colour_of: Spec, index: int, quality: _Quality, cost: int, title: str, on_front: str) -> Spec:
    x = number(f"c{cost}", title)
    y = number(f"q{index}", quality.metric.title)
    tooltip = [
        {"field": "label", "title": "model"},
        {**x, "format": ",.4~g"},
        {**y, "format": ",.4~g"},
    ]
    if quality.task:
        tooltip[-1] = {"field": f"t{index}", "title": quality.metric.title}
        tooltip.append({"field": f"on{index}", "title": "measured on"})
    shown = {"filter": f"isValid(datum.q{index}) && isValid(datum.c{cost})"}
    shape = {
        "field": "state",
        "type": "nominal",
        "scale": {
            "domain": [TEACHER, PRUNED, DISTILLED, "published"],
            "range": ["diamond", "circle", "circle", "cross"],
        },
        "legend": None,
    }
    points: Spec = {
        "mark": {"type": "point", "size": 130, "strokeWidth": 2, "opacity": 1},
        "encoding": {
            "color": colour_of,
            "shape": shape,
            "fill": {"condition": {"test": f"datum.state == '{PRUNED}'", "value": "var(--paper)"}, **colour_of},
            "tooltip": tooltip,
        },
    }
    front: Spec = {
        "transform": [{"filter": f"datum.{on_front} == true"}],
        "mark": {"type": "line", "color": QUIET, "strokeDash": [4, 4], "strokeWidth": 1.5},
    }
    distillations: Spec = {
        "transform": [{"filter": f"datum.state == '{PRUNED}' || datum.state == '{DISTILLED}'"}],
        "mark": {"type": "line", "strokeWidth": 1.5, "opacity": 0.5},
        "encoding": {"color": colour_of, "detail": {"field": "name"}},
    }
    errors: Spec = {
        "transform": [{"filter": f"isValid(datum.low{index})"}],
        "mark": {"type": "rule", "strokeWidth": 1.5},
        "encoding": {
            "y": {"field": f"low{index}", "type": "quantitative", "title": quality.metric.title},
            "y2": {"field": f"high{index}"},
            "color": colour_of,
        },
    }
    layers = [front, distillations, errors, points] if quality.task else [front, distillations, points]
    return {**view(*layers, height=340, x=x, y=y), "transform": [shown]}


def benchmark_chart(models: Sequence[FamilyModel]) -> Chart | None:
    """The scores of all benchmarks with their standard errors; None if there are none.

    Scores of one unit share the axis; those of another unit are in the table only.
    """
    rows: list[Row] = []
    for model in models:
        for task, score in model.figures.tasks.items():
            metric = score.shown_as
            if metric.unit != "%":
                continue
            low, high = metric.span(score.value, score.stderr)
            rows.append(
                {
                    "name": model.name,
                    "state": model.state,
                    "label": _label(model),
                    "task": task,
                    "score": metric.scale * score.value,
                    "text": score.text,
                    "measured_on": measured_on(score),
                    "low": low,
                    "high": high,
                }
            )
    if not rows:
        return None
    order = list(dict.fromkeys(row["label"] for row in rows))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    of = _colours(models)
    colour_of = colours(list(of), chosen=of)
    y = {"field": "task", "type": "nominal", "title": None, "sort": tasks, "scale": {"paddingInner": 0.25}}
    offset = {"field": "label", "sort": order}
    score_axis = {"type": "quantitative", "title": "%", "scale": {"zero": False}}
    chart = view(
        {
            "mark": {"type": "rule", "strokeWidth": 2},
            "encoding": {
                "x": {"field": "low", **score_axis},
                "x2": {"field": "high"},
                "color": colour_of,
            },
        },
        {
            "mark": {"type": "point", "size": 90, "strokeWidth": 2, "opacity": 1},
            "encoding": {
                "x": {"field": "score", **score_axis},
                "color": colour_of,
                "fill": {"condition": {"test": f"datum.state == '{PRUNED}'", "value": "var(--paper)"}, **colour_of},
                "tooltip": [
                    {"field": "label", "title": "model"},
                    {"field": "task"},
                    {"field": "text", "title": "%"},
                    {"field": "measured_on", "title": "measured on"},
                ],
            },
        },
        y=y,
        yOffset=offset,
    )
    chart["height"] = max(160, 16 * len(order) * len(tasks) + 40)
    return one_view("benchmarks", "Scores and their standard errors", rows, chart, _legend(of))


@dataclass(frozen=True)
class BenchmarkTable:
    """A row for each model and then for each published one, a column for each benchmark."""

    header: list[str]
    body: list[list[str]]
    caption: str
    """What the scores were measured on, and where those of published models are from."""


def benchmark_table(models: Sequence[FamilyModel]) -> BenchmarkTable:
    """The scores of the models, beside those that the Minitron papers state for benchmarks with as many examples."""
    scores = {task: score for model in models for task, score in model.figures.tasks.items()}
    header = ["model", *(f"{task}\n{score.shown_as.title}" for task, score in scores.items())]
    body = []
    for model in models:
        own = model.figures.tasks
        cells = [own[t].text if t in own else "failed" for t in scores]
        body.append([_label(model), *cells])
    beside = []
    for each in PUBLISHED:
        known = [each.score(score.task, score.num_fewshot) for score in scores.values()]
        if any(value is not None for value in known):
            beside.append(each)
            pairs = zip(known, scores.values(), strict=True)
            cells = ["" if value is None else score.shown_as.text(value) for value, score in pairs]
            body.append([f"{each.name}, published", *cells])
    measured = {
        f"{t}: {sentence}": None for m in models for t, s in m.figures.tasks.items() for sentence in [measured_on(s)]
    }
    note = error_note(score.stderr for model in models for score in model.figures.tasks.values())
    caption = [*([note] if note else []), *measured]
    if beside:
        caption.append(f"published, not run here: {sources(beside)}, whose own harness and documents may differ")
    return BenchmarkTable(header, body, " · ".join(caption))
