"""The report: one self-contained HTML page of one run, or of several to compare."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import count
from typing import TYPE_CHECKING, Any

from minitron.evaluation.metrics import AGREEMENT, KL, SPEED
from minitron.text import printable
from minitron_platform.cluster.hardware import Hardware
from minitron_platform.recipes.load import recipe_yaml
from minitron_platform.report import candidates, costs, family, lineage
from minitron_platform.report.charts import INK, Chart, colour
from minitron_platform.report.curves import curve_chart, curve_table
from minitron_platform.report.family import PRUNED, FamilyModel
from minitron_platform.report.final_table import LABELS, caption, rows, speed_text
from minitron_platform.report.importance import Importance
from minitron_platform.report.published import PUBLISHED, sources
from minitron_platform.report.script import content_security_policy, page_script
from minitron_platform.report.variants import Version, variant_table
from minitron_platform.shipped_files import data_folder
from minitron_platform.stages.calibrate import Calibrate
from minitron_platform.stages.data import Data
from minitron_platform.stages.distill import Distill
from minitron_platform.stages.evaluate import Evaluate
from minitron_platform.stages.register import Register
from minitron_platform.stages.search import Search
from minitron_platform.stages.state import RunState

if TYPE_CHECKING:
    import jinja2


def environment() -> jinja2.Environment:
    """Jinja's settings for the page: every text is escaped, and has no control characters."""
    import jinja2

    return jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, finalize=_shown, trim_blocks=True, lstrip_blocks=True
    )


def page(states: Sequence[RunState], versions: Mapping[str, Sequence[Version]] | None = None) -> str:
    """The report of one finished run, or of several on one page.

    versions: by run, its students with variants, and these; see `versions_with_variants`.
    """
    from markupsafe import Markup

    folder = data_folder("dashboards") / "report"
    template = environment().from_string((folder / "page.html.j2").read_text(encoding="utf-8"))
    script = page_script()
    numbers = count(1)

    def named(chart: Chart) -> Chart:
        return replace(chart, name=f"chart-{next(numbers)}")

    several = len(states) > 1
    models = [model for state in states for model in family.family_models(state, state.run_key if several else "")]
    quality = named(family.quality_chart(models))
    benchmarks = family.benchmark_chart(models)
    header, body = _compared(models) if several else rows(states[0])
    versions = versions or {}
    runs = [_run(state, index, named, versions.get(state.run_key, ())) for index, state in enumerate(states)]
    scored = family.benchmark_table(models)
    published = {row["name"] for row in quality.rows if row["state"] == "published"}
    return template.render(
        policy=content_security_policy(script),
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        data=_data,
        title=_title(states),
        description=states[0].recipe.description if not several else f"{len(states)} runs compared",
        subtitle=f"{' · '.join(state.run_key for state in states)} · written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        sections=_sections(runs, benchmarks is not None),
        cards=list(_cards(states)),
        quality=quality,
        published=sources([model for model in PUBLISHED if model.name in published]),
        header=header,
        body=body,
        variants=variant_table([version for each in versions.values() for version in each]),
        caption=" · ".join(dict.fromkeys(caption(state) for state in states)),
        benchmark_chart=benchmarks and named(benchmarks),
        scored=scored,
        runs=runs,
        benchmark=candidates.benchmark_text,
    )


def _shown(value: Any) -> Any:
    # not of what the template itself has made, which is escaped already
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _data(chart: Chart) -> Any:
    """A chart's data as JSON inside an HTML element, which no text in it can end."""
    from markupsafe import Markup

    text = json.dumps(chart.json(), allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _title(states: Sequence[RunState]) -> str:
    if len(states) > 1:
        return " and ".join(dict.fromkeys(state.recipe.name for state in states))
    return ", ".join(states[0].output(Register, member).title for member in states[0].recipe.family)


def _sections(runs: Sequence[dict[str, Any]], has_benchmarks: bool) -> dict[str, str]:
    """Titles of the sections by their id, for the links at the top."""
    sections = {"family": "Family"}
    if has_benchmarks:
        sections["benchmarks"] = "Benchmarks"
    if len(runs) > 1:
        return sections | {run["id"]: run["key"] for run in runs}
    (run,) = runs
    sections |= {search["id"]: f"Candidates for {search['model']}" for search in run["searches"]}
    if run["completions"]:
        sections[f"{run['id']}completions"] = "Completions"
    for name, title in (
        ("training", "Distillation"),
        ("importance", "Importance"),
        ("cost", "Time and cost"),
        ("lineage", "Lineage"),
        ("about", "About"),
    ):
        sections[f"{run['id']}{name}"] = title
    return sections


@dataclass(frozen=True)
class _Fact:
    name: str
    value: str
    note: str = ""


def _cards(states: Sequence[RunState]) -> Iterator[dict[str, Any]]:
    """What a reader sees first: the teacher, then each student, in the colours of the charts."""
    several = len(states) > 1
    members = [(state, member) for state in states for member in state.recipe.family]
    for index, (state, member) in enumerate(members):
        table = state.output(Evaluate, member).table
        teacher, pruned, student = table["teacher"], table["pruned"], table["distilled"]
        if member is state.recipe.family[0]:
            facts = [
                _Fact("parameters", _millions(teacher.parameters)),
                _Fact("held-out loss", f"{teacher.loss:.3f}", "nats per token"),
            ]
            if teacher.tokens_per_second is not None:
                facts.append(_Fact(SPEED.unit, speed_text(teacher)))
            yield {"title": f"{state.run_key}: teacher" if several else "Teacher", "facts": facts, "colour": INK}
        less = 1 - student.parameters / teacher.parameters
        facts = [
            _Fact("parameters", _millions(student.parameters), f"{less:.0%} fewer than the teacher"),
            _Fact(KL.name, f"{student.kl:.3f}", f"{pruned.kl:.3f} before the distillation"),
            _Fact(AGREEMENT.title, AGREEMENT.text(student.top1_agreement), "as the teacher's"),
        ]
        if student.tokens_per_second is not None and teacher.tokens_per_second is not None:
            faster = student.tokens_per_second / teacher.tokens_per_second
            facts.append(_Fact(SPEED.unit, speed_text(student), f"{faster:.2f} times the teacher's"))
        title = f"{state.run_key}: {member.model}" if several else member.model
        yield {"title": title, "facts": facts, "colour": colour(index)}


def _millions(parameters: int) -> str:
    return f"{parameters / 1e9:,.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:,.1f} M"


def _compared(models: Sequence[FamilyModel]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of several runs: a row for each model, without those that were pruned only."""
    header = ["model", "parameters", KL.name, "held-out loss", AGREEMENT.title, "tokens\nper second"]
    body = [
        [
            model.name,
            f"{model.figures.parameters:,}",
            KL.text(model.figures.kl),
            f"{model.figures.loss:.3f}",
            AGREEMENT.text(model.figures.top1_agreement),
            speed_text(model.figures),
        ]
        for model in models
        if model.state != PRUNED
    ]
    return header, body


def _run(state: RunState, index: int, named: Any, versions: Sequence[Version]) -> dict[str, Any]:
    """The sections of one run, for the template."""
    recipe = state.recipe
    prefix = f"run{index}-"
    step_tokens = recipe.search.training.batch_rows * state.output(Data).seq_length
    searches = []
    importances = []
    for number, member in enumerate(recipe.family):
        search = state.output(Search, member)
        searches.append(
            {
                "id": f"{prefix}search{number}",
                "model": member.model,
                "output": search,
                "chart": named(candidates.candidate_chart(state, member.model, search, step_tokens)),
                "benchmarks": candidates.benchmark_titles(search),
                "serving": candidates.serving_text(search),
                "measured_on": candidates.benchmarks_text(search),
                "findings": candidates.findings(search),
            }
        )
        importance = Importance(member.model, state.output(Calibrate, member), search.winner)
        importances.append(
            {
                "layers": named(importance.layer_chart()),
                "layer_rows": [
                    [str(r["layer"]), f"{r['importance']:.4g}", r["state"]] for r in importance.layer_rows()
                ],
                "units": named(importance.unit_chart()),
                "unit_rows": importance.unit_table(),
            }
        )
    spent = costs.stage_costs(state)
    hardware = Hardware.read(state.locations.run(state.run_key))
    cost_header, cost_rows = costs.cost_table(spent, hardware, recipe.resources.price_per_gpu_hour)
    curves = curve_chart(state)
    return {
        "id": prefix,
        "key": state.run_key,
        "state": state,
        "searches": searches,
        "importance": importances,
        "curves": curves and named(curves),
        "curve_table": curves and curve_table(curves),
        "training": [_trained(state, member) for member in recipe.family],
        "losses": [f"{member.model}: {state.output(Distill, member).losses_chosen}." for member in recipe.family],
        "costs": named(costs.cost_chart(spent)),
        "cost_header": cost_header,
        "cost_rows": cost_rows,
        "cost_note": costs.NOTE,
        "completions": _completions(state),
        "restarts": lineage.restarts(state),
        "lineage": lineage.lineage(state, versions),
        "facts": {**lineage.facts(state), "hardware": hardware.text if hardware else "not known"},
        "links": lineage.model_links(state),
        "recipe": recipe_yaml(recipe),
    }


def _trained(state: RunState, member: Any) -> list[str]:
    """A row of the table of distillations."""
    output = state.output(Distill, member)
    table = state.output(Evaluate, member).table
    return [
        member.model,
        f"{output.tokens:,}",
        f"{output.parameters:,}",
        KL.text(table["pruned"].kl),
        KL.text(table["distilled"].kl),
        speed_text(table["distilled"]),
    ]


def _completions(state: RunState) -> list[dict[str, Any]]:
    """How the models continue each of the recipe's prompts: the teacher, then each student before and after."""
    prompts: dict[str, list[tuple[str, str]]] = {}
    for member in state.recipe.family:
        written = state.output(Evaluate, member).completions
        for index, prompt in enumerate(written.prompts if written else ()):
            assert written is not None
            texts = prompts.setdefault(prompt, [])
            if not texts:
                texts.append(("teacher", written.texts["teacher"][index]))
            texts += [(f"{member.model}, {label}", written.texts[name][index]) for name, label in LABELS.items()]
    return [{"prompt": prompt, "texts": texts} for prompt, texts in prompts.items()]
