"""The table, the picture and the page at the end of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from minitron import storage
from minitron_platform.context import Context
from minitron_platform.resources import data_folder
from minitron_platform.tracking import shown

LABELS = {"pruned": "pruned only", "distilled": "distilled"}


def _columns(context: Context) -> list[tuple[str, dict[str, Any]]]:
    """Title and figures of every model: the teacher, then each of the family before and after its distillation."""
    tables = {model: own["evaluate"]["table"] for model, own in context.family.items()}
    columns = [("teacher", next(iter(tables.values()))["teacher"])]
    for model, table in tables.items():
        name = f"{model}\n" if len(tables) > 1 else ""
        columns += [(name + label, table[key]) for key, label in LABELS.items()]
    return columns


def rows(context: Context) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the final table, as text: a column per model, a row per figure."""
    columns = _columns(context)
    figures: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("parameters", lambda m: f"{m['parameters']:,}"),
        ("held-out loss", lambda m: f"{m['loss']:.3f}"),
        ("KL to the teacher", lambda m: f"{m['kl']:.3f}"),
        ("same first token", lambda m: f"{100 * m['top1_agreement']:.1f} %"),
        *((task, partial(_score, task)) for task in columns[0][1]["tasks"]),
        ("tokens per second", lambda m: f"{m['tokens_per_second']:,.0f}"),
    ]
    return ["", *(title for title, _ in columns)], [[name, *[text(m) for _, m in columns]] for name, text in figures]


def _score(task: str, model: dict[str, Any]) -> str:
    score = model["tasks"][task]
    error = f" ± {100 * score['stderr']:.1f}" if score["stderr"] is not None else ""
    return f"{100 * score['value']:.1f}{error} %"


def caption(context: Context) -> str:
    """What the table's figures are measured on."""
    model = _columns(context)[-1][1]
    tasks = [
        f"{name}: {s['metric']}, {s['num_fewshot']}-shot, first {s['num_documents']} documents of {s['split']}"
        for name, s in model["tasks"].items()
    ]
    tokens = f"{model['heldout_tokens']:,} held-out tokens"
    return " · ".join([f"loss and KL in nats per token on {tokens}", *tasks, "± is the standard error"])


def final_table(context: Context) -> Table:
    """The table for a terminal."""
    header, body = rows(context)
    table = Table(caption=caption(context), caption_justify="left")
    for index, title in enumerate(header):
        table.add_column(title, justify="left" if index == 0 else "right")
    for row in body:
        table.add_row(*row)
    return table


def write_report(context: Context, parent: Any) -> Path:
    """Write report.html, report.png and results.json beside the run's record, once per result."""
    folder = Path(context.places.local_run(context.run_key))
    results = {"run": context.run_key, "stages": context.shared, "family": context.family}
    text = json.dumps(results, indent=1, sort_keys=True)
    target = folder / "results.json"
    if not parent.open and target.exists() and target.read_text() == text and (folder / "report.html").exists():
        return folder
    with context.console.working("report"):
        picture = draw(context)
        storage.write_bytes(str(folder / "report.png"), picture)
        storage.write_bytes(str(folder / "report.html"), page(context).encode())
        storage.write_bytes(str(target), text.encode())
    if not parent.open:
        parent.reopen()
    for name in ("report.html", "report.png", "results.json", "recipe.yaml"):
        parent.log.artifact(str(folder / name))
        if not storage.is_local(context.places.storage):
            storage.write_bytes(storage.join(context.places.run(context.run_key), name), (folder / name).read_bytes())
    return folder


def draw(context: Context) -> bytes:
    """For each model of the family its search and its distillation, as a PNG: a bar per candidate, and the training curve."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        count = len(context.family)
        figure, axes = pyplot.subplots(count, 2, figsize=(11, 3.8 * count), layout="constrained", squeeze=False)
        for (left, right), (model, own) in zip(axes, context.family.items(), strict=True):
            name = f"{model}: " if count > 1 else ""
            _draw_search(left, own["search"]["ranking"], name)
            _draw_distillation(right, context, own, name)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        pyplot.close(figure)
    return buffer.getvalue()


def _draw_search(axes: Any, ranking: list[dict[str, Any]], name: str) -> None:
    ordered = ranking[::-1]
    names = [f"{r['num_layers']}L·{r['hidden_size']}·{r['intermediate_size']}" for r in ordered]
    colours = ["#76b900" if r["winner"] else "#b5d99c" if r["tied"] else "#9aa5b1" for r in ordered]
    axes.barh(names, [r["kl_undistilled"] for r in ordered], color="#e4e7eb", label="pruned only")
    axes.barh(names, [r["kl"] for r in ordered], color=colours, label="after its short distillation")
    axes.set_xlabel("held-out KL to the teacher, nats per token")
    axes.set_title(f"{name}search, {len(ranking)} candidates, best at the top", loc="left", fontsize=10)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2)


def _draw_distillation(axes: Any, context: Context, own: dict[str, dict[str, Any]], name: str) -> None:
    curve = storage.read_json(own["distill"]["curve"])
    measure, unit = ("train_kl", "KL to the teacher") if curve["train_kl"] else ("train_loss", "loss")
    per_step = own["distill"]["tokens"] / curve["step"][-1]
    axes.plot([step * per_step for step in curve["step"]], curve[measure], color="#76b900", label="training rows")
    for key, style in (("pruned", ":"), ("distilled", "--")) if measure == "train_kl" else ():
        value = own["evaluate"]["table"][key]["kl"]
        axes.axhline(value, color="#52606d", linestyle=style, label=f"{LABELS[key]}, held-out rows")
    axes.set_xlabel("tokens")
    axes.set_ylabel(f"{unit}, nats per token")
    axes.set_title(f"{name}distillation", loc="left", fontsize=10)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def page(context: Context) -> str:
    """The run as one self-contained page."""
    import base64

    import jinja2

    header, body = rows(context)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((data_folder("dashboards") / "report.html.j2").read_text())
    folder = Path(context.places.local_run(context.run_key))
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
        origins={m.model: o.model for m in context.recipe.family if (o := context.recipe.origin(m))},
        tracking_uri=shown(context.places.tracking_uri),
    )
