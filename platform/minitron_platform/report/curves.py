"""Training curves in the report: training rows and held-out rows by tokens."""

from __future__ import annotations

from minitron import storage
from minitron.evaluation.metrics import KL, LOSS
from minitron_platform.recipes.schema import Member
from minitron_platform.report.charts import TOKENS, Chart, Mark, Row, Spec, colour, colours, number, view
from minitron_platform.stages.data import Data
from minitron_platform.stages.distill import Distill
from minitron_platform.stages.evaluate import Evaluate
from minitron_platform.stages.state import RunState
from minitron_platform.tracking.recorded import recorded_metrics

MAX_POINTS = 500  # of a curve; longer ones are means of as many neighbours
MAX_ROWS = 20  # of a training in the table
TITLES = {  # the loss of a training is its whole objective, that of the held-out rows the cross-entropy
    "kl": f"KL to the teacher, {KL.unit}",
    "loss": f"objective (line) and held-out loss (points), {LOSS.unit}",
}


def curve_chart(state: RunState) -> Chart | None:
    """The distillation of every model: a line for the training rows, points for the held-out rows; None without a curve.

    The held-out rows are measured before and after, and meanwhile if the recipe says so; a run that took its distillation from
    another one has no record of those.
    """
    rows: list[Row] = []
    for member in state.recipe.family:
        step_tokens = state.recipe.distillation(member).batch_rows * state.output(Data).seq_length
        curve = storage.read_json(state.output(Distill, member).curve)
        for measure, field in (("kl", "train_kl"), ("loss", "train_loss")):
            for tokens, value in _thinned([step * step_tokens for step in curve["step"]], curve[field]):
                rows.append({"kind": "train", "name": member.model, "tokens": tokens, measure: value})
        table = state.output(Evaluate, member).table
        for name, tokens in (("pruned", 0), ("distilled", state.output(Distill, member).tokens)):
            held = {"kl": table[name].kl, "loss": table[name].loss}
            rows.append({"kind": "heldout", "name": member.model, "tokens": tokens, **held})
        for tokens, held in _heldout(state, member, step_tokens).items():
            rows.append({"kind": "heldout", "name": member.model, "tokens": tokens, **held})
    known = [measure for measure in TITLES if any(measure in row for row in rows if row["kind"] == "train")]
    if not known:
        return None
    names = [member.model for member in state.recipe.family]
    views: dict[tuple[str, ...], Spec] = {
        (TITLES[measure].split(",")[0],): _curve_view(names, measure) for measure in known
    }
    legend = [Mark(name, colour(index)) for index, name in enumerate(names)]
    legend += [
        Mark("line: training rows", "var(--quiet)"),
        Mark("points, dashed: held-out rows", "var(--quiet)", hollow=True),
    ]
    switches = {"Show": tuple(option for (option,) in views)}
    return Chart("curves", "Loss and KL by tokens", rows, views, switches, tuple(legend))


def curve_table(chart: Chart) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of a curve chart: the points of the held-out rows, and MAX_ROWS of each training."""
    points: dict[tuple[str, float, str], Row] = {}
    for name in dict.fromkeys(row["name"] for row in chart.rows):
        of_training = [row for row in chart.rows if row["name"] == name and row["kind"] == "train"]
        tokens = list(dict.fromkeys(row["tokens"] for row in of_training))
        kept = set(tokens[:: -(-len(tokens) // MAX_ROWS) or 1] + tokens[-1:])
        shown = [row for row in of_training if row["tokens"] in kept]
        shown += [row for row in chart.rows if row["name"] == name and row["kind"] == "heldout"]
        for row in sorted(shown, key=lambda row: row["tokens"]):
            points.setdefault((name, row["tokens"], row["kind"]), {}).update(row)
    columns = (("train", "kl"), ("heldout", "kl"), ("train", "loss"), ("heldout", "loss"))
    return ["model", "tokens", "KL\nin training", "KL\nheld-out", "objective\nof training", "loss\nheld-out"], [
        [name, f"{tokens:,.0f}", *(f"{row[m]:.3f}" if kind == of and m in row else "" for of, m in columns)]
        for (name, tokens, kind), row in points.items()
    ]


def _heldout(state: RunState, member: Member, step_tokens: int) -> dict[int, dict[str, float]]:
    """KL and loss on the held-out rows during a distillation, by tokens, without its end."""
    output = state.output(Distill, member)
    names = {"heldout_kl": "kl", "heldout_loss": "loss"}
    key = state.record_key(Distill.name, member)
    recorded = recorded_metrics(state.locations.spool(state.run_key), key, output.fingerprint, names)
    found: dict[int, dict[str, float]] = {}
    for name, points in recorded.items():
        for step, value in points.items():
            if step * step_tokens < output.tokens:
                found.setdefault(step * step_tokens, {})[names[name]] = value
    return dict(sorted(found.items()))


def _curve_view(names: list[str], measure: str) -> Spec:
    title = TITLES[measure]
    colour_of = colours(names)
    tooltip = [
        {"field": "name", "title": "model"},
        {"field": "tokens", "type": "quantitative", "format": ","},
        {"field": measure, "type": "quantitative", "title": title, "format": ".3f"},
    ]
    return {
        **view(
            {
                "transform": [{"filter": "datum.kind == 'train'"}],
                "mark": {"type": "line", "strokeWidth": 1.8},
                "encoding": {"color": colour_of},
            },
            {
                "transform": [{"filter": "datum.kind == 'heldout'"}],
                "mark": {"type": "line", "strokeWidth": 1.2, "strokeDash": [4, 3]},
                "encoding": {"color": colour_of},
            },
            {
                "transform": [{"filter": "datum.kind == 'heldout'"}],
                "mark": {"type": "point", "size": 110, "strokeWidth": 2.5, "opacity": 1, "fill": "var(--paper)"},
                "encoding": {"color": colour_of, "tooltip": tooltip},
            },
            x=number("tokens", "tokens", axis=TOKENS),
            y=number(measure, title),
        ),
        "transform": [{"filter": f"isValid(datum.{measure})"}],
    }


def _thinned(tokens: list[int], values: list[float]) -> list[tuple[float, float]]:
    """The points of a curve, or the means of neighbours if there are more than MAX_POINTS."""
    size = -(-len(values) // MAX_POINTS) or 1
    groups = [(tokens[i : i + size], values[i : i + size]) for i in range(0, len(values), size)]
    return [(sum(at) / len(at), sum(own) / len(own)) for at, own in groups]
