"""Writes minitron.json, the Grafana dashboard of a run, beside this file (or to the path that is given): `make dashboards`.

Built by the Grafana foundation SDK, which is generated from Grafana's own schema. The metrics are those of
minitron_platform/monitoring.py and Ray's own of its nodes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import BigValueGraphMode, LegendDisplayMode, StackingMode, VisibilityMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
RUN = 'run=~"$run"'
WIDTH = 24  # of Grafana's grid


def query(expression: str, legend: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().datasource(SOURCE).expr(expression).legend_format(legend)


def curve(title: str, what: str, expression: str, *, legend: str = "{{part}}", unit: str = "short") -> timeseries.Panel:
    """A chart of a third of the width."""
    return (
        timeseries.Panel()
        .title(title)
        .description(what)
        .datasource(SOURCE)
        .with_target(query(expression, legend))
        .unit(unit)
        .span(WIDTH // 3)
        .height(8)
        .show_points(VisibilityMode.NEVER)
        .legend(common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).show_legend(True))
    )


def stacked(panel: timeseries.Panel) -> timeseries.Panel:
    return panel.fill_opacity(60).stacking(common.StackingConfig().mode(StackingMode.NORMAL))


def number(title: str, what: str, expression: str, *, bad_above: float | None = None) -> stat.Panel:
    """A number of a sixth of the width, red above `bad_above`."""
    steps = [Threshold(value=None, color="green")]
    if bad_above is not None:
        steps.append(Threshold(value=bad_above, color="red"))
    return (
        stat.Panel()
        .title(title)
        .description(what)
        .datasource(SOURCE)
        .with_target(query(expression, title))
        .graph_mode(BigValueGraphMode.AREA)
        .thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
        .no_value("–")
        .span(WIDTH // 6)
        .height(4)
    )


def stages() -> statetimeline.Panel:
    shown = {
        "0": ValueMappingResult(text="ended", color="transparent"),
        "1": ValueMappingResult(text="runs", color="blue"),
    }
    return (
        statetimeline.Panel()
        .title("Stages")
        .description("When each stage of the run computes.")
        .datasource(SOURCE)
        .with_target(query(f'max by (part) (ray_minitron_running{{{RUN}, kind="stage"}})', "{{part}}"))
        .mappings([ValueMap(options=shown)])
        .show_value(VisibilityMode.NEVER)
        .span(WIDTH * 2 // 3)
        .height(8)
    )


def made() -> dashboard.Dashboard:
    def of(name: str) -> str:
        return f"ray_minitron_{name}{{{RUN}}}"

    return (
        dashboard.Dashboard("Minitron")
        .uid("minitron")
        .description("A run of Minitron: stages, trials, training and machines.")
        .tags(["minitron", "ray"])
        .refresh("10s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus").multi(False))
        .with_variable(
            dashboard.QueryVariable("run")
            .label("Run")
            .datasource(SOURCE)
            .query("label_values(ray_minitron_running, run)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(VariableSort.ALPHABETICAL_ASC)
            .current(VariableOption(selected=True, text="All", value="$__all"))
            .multi(True)
            .include_all(True)
        )
        .with_row(dashboard.Row("Run"))
        .with_panel(number("Tokens/s", "All trainings that run now.", f"sum({of('tokens_per_second')})"))
        .with_panel(number("Runs", "Runs that compute now.", f'sum(ray_minitron_running{{{RUN}, kind="run"}})'))
        .with_panel(
            number(
                "Failures",
                "Stages and trials that have failed.",
                f'sum(ray_minitron_parts{{{RUN}, state="failed"}}) or vector(0)',
                bad_above=1,
            )
        )
        .with_panel(
            number("Restarts", "Of trainings, after a failure.", f"sum({of('restarts')}) or vector(0)", bad_above=1)
        )
        .with_panel(
            number(
                "Skipped steps",
                "Steps whose loss or gradient was not finite.",
                f"sum({of('skipped_steps')}) or vector(0)",
                bad_above=1,
            )
        )
        .with_panel(
            number(
                "Unsent records",
                "Records that MLflow does not have yet.",
                f"sum({of('unsent_records')})",
                bad_above=1000,
            )
        )
        .with_panel(stages())
        .with_panel(
            stacked(
                curve(
                    "Trials by state",
                    "Candidates of the search.",
                    f'sum by (state) (ray_minitron_parts{{{RUN}, kind="trial"}})',
                    legend="{{state}}",
                )
            )
        )
        .with_row(dashboard.Row("Training"))
        .with_panel(curve("Tokens/s", "Read by each training.", of("tokens_per_second")))
        .with_panel(curve("KL on training rows", "Divergence from the teacher, nats per token.", of("train_kl")))
        .with_panel(curve("KL on held-out rows", "Divergence from the teacher, nats per token.", of("heldout_kl")))
        .with_panel(curve("Training loss", "The whole objective.", of("train_loss")))
        .with_panel(
            curve(
                "FLOP utilisation",
                "Model FLOPs as a share of the measured peak.",
                of("flop_utilisation"),
                unit="percentunit",
            )
        )
        .with_panel(
            stacked(
                curve(
                    "Parts of a step",
                    "What a step's time is spent on, the mean of the trainings.",
                    f"avg by (what) ({of('step_part_seconds')})",
                    legend="{{what}}",
                    unit="s",
                )
            )
        )
        .with_panel(curve("Gradient norm", "L2 norm of the gradient.", of("grad_norm")))
        .with_panel(curve("Learning rate", "Of the last reported step.", of("learning_rate")))
        .with_panel(
            curve(
                "Time since the last step",
                "Of trainings that run.",
                f"time() - {of('last_step_time_seconds')} and on (run, part) ray_minitron_running == 1",
                unit="s",
            )
        )
        .with_row(dashboard.Row("Machines"))
        .with_panel(
            curve(
                "GPU utilisation",
                "Share of the time in which a kernel runs, of all of Ray's nodes.",
                "ray_node_gpus_utilization",
                legend="{{instance}} GPU {{GpuIndex}}",
                unit="percent",
            )
        )
        .with_panel(
            curve(
                "GPU memory",
                "Used on each GPU of Ray's nodes.",
                "ray_node_gram_used * 1024 * 1024",
                legend="{{instance}} GPU {{GpuIndex}}",
                unit="bytes",
            )
        )
        .with_panel(
            curve(
                "Memory",
                "Used on each of Ray's nodes.",
                "ray_node_mem_used_host",
                legend="{{instance}}",
                unit="bytes",
            )
        )
        .with_panel(
            curve(
                "CPU",
                "Utilisation of each of Ray's nodes.",
                "ray_node_cpu_utilization",
                legend="{{instance}}",
                unit="percent",
            )
        )
    )


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("minitron.json")
    target.write_text(JSONEncoder(sort_keys=True, indent=1).encode(made().build()) + "\n")
