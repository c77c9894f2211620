"""The candidates of a search in the report: their chart, and sentences about the search."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from minitron.evaluation.metrics import KL, error_note
from minitron_platform.recipes.search_schedule import SearchSchedule
from minitron_platform.report.charts import INK, QUIET, TOKENS, Chart, Mark, Row, Spec, colours, number, view
from minitron_platform.report.final_table import task_title
from minitron_platform.stages.search_output import SearchOutput
from minitron_platform.stages.state import RunState
from minitron_search.ranking import RankedCandidate, pareto
from minitron_search.stored_trials import StoredTrials
from minitron_search.tau import SETTLED

# Costs of a ranked candidate that KL is plotted against: field, divisor, title and option of the switch. Latency is only
# known if it is limited.
COSTS = (
    ("parameters", 1e6, "million parameters", "size"),
    ("flops_per_token", 1e9, "GFLOPs per token", "compute"),
    ("memory_bytes", 1e6, "MB of weights and KV cache", "memory"),
    ("latency_ms", 1, "ms to the first token", "latency"),
    ("token_latency_ms", 1, "ms to each further token", "token latency"),
)
RUNGS = "training"
WINNER, TIED, BEHIND, STOPPED = "winner", "tied with the best", "behind", "stopped early"
STANDINGS = {WINNER: "var(--c1)", TIED: "var(--c2)", BEHIND: QUIET, STOPPED: "var(--c3)"}


def candidate_chart(state: RunState, model: str, search: SearchOutput, step_tokens: int) -> Chart:
    """Held-out KL of a search's candidates against each cost, and against the tokens they were trained on.

    step_tokens: number of tokens in a training step of a trial.
    """
    rows = [*_results(search), *_measurements(state, search, step_tokens)]
    costs = [cost for cost in COSTS if getattr(search.ranking[0], cost[0]) is not None]
    views: dict[tuple[str, ...], Spec] = {}
    ranked = [row for row in rows if row["kind"] == "result"]
    for index, (_, _, title, option) in enumerate(costs):
        for place in pareto([row[f"c{index}"] for row in ranked], [row["kl"] for row in ranked]):
            ranked[place][f"f{index}"] = True
        views[(option,)] = _cost_view(index, title)
    views[(RUNGS,)] = _rung_view()
    shown = list(dict.fromkeys(row["standing"] for row in rows))
    legend = [Mark(standing, of) for standing, of in STANDINGS.items() if standing in shown]
    switches = {"KL against": tuple(option for (option,) in views)}
    return Chart(f"candidates-{model}", "Quality against cost", rows, views, switches, tuple(legend))


def _standing(candidate: RankedCandidate) -> str:
    return WINNER if candidate.winner else TIED if candidate.tied else BEHIND


def _results(search: SearchOutput) -> Iterator[Row]:
    """A row for each candidate that was distilled to the end. The error is that of the difference to the best."""
    for candidate in search.ranking:
        stderr = candidate.kl_difference_stderr or 0.0
        row: Row = {
            "kind": "result",
            "name": str(candidate.architecture),
            "standing": _standing(candidate),
            "kl": candidate.kl,
            "low": candidate.kl - stderr,
            "high": candidate.kl + stderr,
        }
        costs = [cost for cost in COSTS if getattr(candidate, cost[0]) is not None]
        yield row | {f"c{index}": getattr(candidate, name) / unit for index, (name, unit, *_) in enumerate(costs)}


def _measurements(state: RunState, search: SearchOutput, step_tokens: int) -> Iterator[Row]:
    """A row for each measurement of a candidate: before its training, at the rungs, and at the end."""
    at_rungs: Mapping[object, Mapping[int, float]] = {}
    if SearchSchedule(state.recipe.search).rungs:
        results = StoredTrials(search.trials).results(search.architectures)
        at_rungs = {architecture: result.rung_kl for architecture, result in results.items()}
    for candidate in search.ranking:
        rungs = at_rungs.get(candidate.architecture, {})
        points = {0: candidate.kl_undistilled, **{step * step_tokens: kl for step, kl in rungs.items()}}
        points[candidate.tokens] = candidate.kl
        for tokens, kl in points.items():
            yield _measurement(str(candidate.architecture), _standing(candidate), tokens, kl)
    for stopped in search.stopped:
        for tokens, kl in ((0, stopped.kl_undistilled), (stopped.step * step_tokens, stopped.kl)):
            yield _measurement(str(stopped.architecture), STOPPED, tokens, kl)


def _measurement(name: str, standing: str, tokens: int, kl: float) -> Row:
    return {"kind": "measured", "name": name, "standing": standing, "tokens": tokens, "kl": kl}


_COLOUR = colours(list(STANDINGS), "standing", chosen=STANDINGS)


def _cost_view(index: int, title: str) -> Spec:
    x = number(f"c{index}", title)
    y = number("kl", f"held-out {KL.title}")
    tooltip = [
        {"field": "name", "title": "architecture"},
        {"field": "standing", "title": "standing"},
        {**x, "format": ",.4~g"},
        {**y, "format": ".3f"},
    ]
    return {
        **view(
            {
                "transform": [{"filter": f"datum.f{index} == true"}],
                "mark": {"type": "line", "color": QUIET, "strokeDash": [4, 4], "strokeWidth": 1.5},
            },
            {
                "mark": {"type": "rule", "strokeWidth": 1.5},
                "encoding": {
                    "y": {"field": "low", "type": "quantitative", "title": f"held-out {KL.title}"},
                    "y2": {"field": "high"},
                    "color": _COLOUR,
                },
            },
            {
                "mark": {"type": "circle", "size": 110, "opacity": 1, "stroke": INK, "strokeWidth": 0.5},
                "encoding": {"color": _COLOUR, "tooltip": tooltip},
            },
            x=x,
            y=y,
        ),
        "transform": [{"filter": "datum.kind == 'result'"}],
    }


def _rung_view() -> Spec:
    tooltip = [
        {"field": "name", "title": "architecture"},
        {"field": "standing", "title": "standing"},
        {"field": "tokens", "title": "tokens", "format": ","},
        {"field": "kl", "title": KL.title, "format": ".3f"},
    ]
    return {
        **view(
            {
                "mark": {"type": "line", "strokeWidth": 2},
                "encoding": {"color": _COLOUR, "detail": {"field": "name"}},
            },
            {
                "mark": {"type": "circle", "size": 70, "opacity": 1},
                "encoding": {"color": _COLOUR, "tooltip": tooltip},
            },
            x=number("tokens", "training tokens", axis=TOKENS),
            y=number("kl", f"held-out {KL.title}"),
        ),
        "transform": [{"filter": "datum.kind == 'measured'"}],
    }


def benchmark_text(candidate: RankedCandidate, task: str) -> str:
    """A candidate's score on a task; empty if it has none."""
    score = candidate.score(task)
    return "" if score is None else score.text


def benchmark_titles(search: SearchOutput) -> dict[str, str]:
    """Title of each benchmark's column."""
    return {task: task_title(task, search.metrics.get(task)) for task in search.benchmarks}


def benchmarks_text(search: SearchOutput) -> str:
    """A sentence that says what the candidates' scores were measured on; empty without scores."""
    scores = [score for candidate in search.ranking for score in candidate.benchmarks]
    measured = {score.task: f"{score.task}: {score.measured_on}" for score in scores if score.measured_on}
    note = error_note(score.stderr for score in scores)
    return ". ".join([*(["; ".join(measured.values())] if measured else []), note]) + "." if scores else ""


def serving_text(search: SearchOutput) -> str:
    """A sentence that says what memory and latency of the candidates refer to."""
    serving = search.serving
    sequences = "one sequence" if serving.batch == 1 else f"{serving.batch} sequences"
    text = f"Memory is that of the weights and the KV cache of {sequences} of {serving.context:,} tokens, at 16 bits per value"
    best = search.ranking[0]
    if best.latency_ms is not None:
        text += "; latency is the median time to their first token"
    if best.token_latency_ms is not None:
        text += "; token latency is the median time to each further one"
    return f"{text}."


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
