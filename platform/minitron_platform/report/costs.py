"""Time and compute of a run's stages in the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from minitron.device import DTYPES
from minitron_platform.cluster.hardware import Hardware
from minitron_platform.console import seconds
from minitron_platform.estimates.outlook import Outlook
from minitron_platform.recipes.candidates import family_candidates
from minitron_platform.recipes.resources import resolve
from minitron_platform.report.charts import QUIET, Chart, Mark, Row, colour, colours, one_view, view
from minitron_platform.stages.order import steps
from minitron_platform.stages.state import RunState
from minitron_platform.stages.teacher import Teacher

SHARED = "whole family"


@dataclass(frozen=True)
class StageCost:
    """What a finished stage took."""

    stage: str
    model: str
    """SHARED, or the model that it was for."""
    seconds: float
    flops: float
    """As minitron plan estimates them before the run."""

    @property
    def speed(self) -> float | None:
        """Estimated FLOPs per second; None for a stage that mostly does something else."""
        return self.flops / self.seconds if self.flops > 0 and self.seconds > 0 else None


def stage_costs(state: RunState) -> list[StageCost]:
    """The finished stages in order."""
    teacher = state.output(Teacher)
    recipe = state.recipe
    value_bytes = DTYPES[teacher.dtype].itemsize
    outlook = Outlook.of(
        recipe,
        teacher.architecture,
        resolve(recipe, 0),
        family=family_candidates(recipe, teacher.architecture),
        value_bytes=value_bytes,
        concurrent_trials=1,
    )

    def costs() -> Iterator[StageCost]:
        for stage, member in steps(recipe):
            outputs = state.family[member.model] if member else state.shared
            seconds = state.seconds[outputs[stage.name].fingerprint]
            flops = stage.estimate(outlook, member).flops
            yield StageCost(stage.name, member.model if member else SHARED, seconds, flops)

    return list(costs())


def cost_chart(costs: list[StageCost]) -> Chart:
    """The time of every stage, by model."""
    rows: list[Row] = [
        {
            "stage": cost.stage,
            "name": cost.model,
            "minutes": cost.seconds / 60,
            "tflop": cost.flops / 1e12,
            "speed": (cost.speed or 0) / 1e9,
        }
        for cost in costs
    ]
    names = list(dict.fromkeys(cost.model for cost in costs))
    students = [name for name in names if name != SHARED]
    of = {SHARED: QUIET} | {name: colour(index) for index, name in enumerate(students)}
    stages = list(dict.fromkeys(cost.stage for cost in costs))
    chart = view(
        {
            "mark": {"type": "bar", "cornerRadiusEnd": 2},
            "encoding": {
                "color": colours(names, chosen=of),
                "tooltip": [
                    {"field": "stage"},
                    {"field": "name", "title": "for"},
                    {"field": "minutes", "type": "quantitative", "format": ",.2f"},
                    {"field": "tflop", "type": "quantitative", "title": "TFLOP, estimated", "format": ",.2f"},
                    {"field": "speed", "type": "quantitative", "title": "GFLOP/s", "format": ",.1f"},
                ],
            },
        },
        x={"field": "minutes", "type": "quantitative", "title": "minutes", "stack": "zero"},
        y={"field": "stage", "type": "nominal", "sort": stages, "title": None},
    )
    chart["height"] = 26 * len(stages)
    legend = [Mark(name, of[name]) for name in names]
    return one_view("costs", "Time of the stages", rows, chart, legend)


NOTE = (
    "TFLOP are those that minitron plan estimates from shapes; GFLOP/s are these divided by the whole time of the stage, "
    "start-up and measurements included. A stage that this run found done has the time that it took when it was computed."
)


def cost_table(
    costs: list[StageCost], hardware: Hardware | None, price: float | None
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the stages and their sum, as text.

    hardware: that the run computed on; with GPUs of known FLOP/s, their utilisation is shown. price: of a GPU for an hour.
    """
    gpus = hardware.gpus if hardware else 0
    peak = hardware.gpu_flops * gpus if hardware and hardware.gpu_flops else None
    columns: list[tuple[str, Callable[[StageCost], str]]] = [
        ("for", lambda cost: cost.model),
        ("time", lambda cost: seconds(cost.seconds)),
        ("TFLOP,\nestimated", lambda cost: f"{cost.flops / 1e12:,.2f}" if cost.flops else ""),
        ("GFLOP/s", lambda cost: "" if cost.speed is None else f"{cost.speed / 1e9:,.1f}"),
    ]
    if peak:
        columns.append(("of the data\nsheet's, %", lambda cost: f"{100 * cost.speed / peak:.1f}" if cost.speed else ""))
    if price is not None and gpus:
        columns.append(("price", lambda cost: f"{cost.seconds / 3600 * gpus * price:,.2f}"))
    total = StageCost("total", "", sum(cost.seconds for cost in costs), sum(cost.flops for cost in costs))
    body = [[cost.stage, *(text(cost) for _, text in columns)] for cost in (*costs, total)]
    return ["stage", *(title for title, _ in columns)], body
