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

MODELS = {"teacher": "teacher", "pruned": "pruned only", "distilled": "distilled"}


def rows(done: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the final table, as text: a column per model, a row per figure."""
    models = [done["evaluate"]["table"][key] for key in MODELS]
    figures: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("parameters", lambda m: f"{m['parameters']:,}"),
        ("held-out loss", lambda m: f"{m['loss']:.3f}"),
        ("KL to the teacher", lambda m: f"{m['kl']:.3f}"),
        ("same first token", lambda m: f"{100 * m['top1_agreement']:.1f} %"),
        *((task, partial(_score, task)) for task in models[0]["tasks"]),
        ("tokens per second", lambda m: f"{m['tokens_per_second']:,.0f}"),
    ]
    return ["", *MODELS.values()], [[name, *[text(model) for model in models]] for name, text in figures]


def _score(task: str, model: dict[str, Any]) -> str:
    score = model["tasks"][task]
    error = f" ± {100 * score['stderr']:.1f}" if score["stderr"] is not None else ""
    return f"{100 * score['value']:.1f}{error} %"


def caption(done: dict[str, dict[str, Any]]) -> str:
    """What the table's figures are measured on."""
    table = done["evaluate"]["table"]
    tasks = [
        f"{name}: {s['metric']}, {s['num_fewshot']}-shot, first {s['num_documents']} documents of {s['split']}"
        for name, s in table["distilled"]["tasks"].items()
    ]
    tokens = f"{table['distilled']['heldout_tokens']:,} held-out tokens"
    return " · ".join([f"loss and KL in nats per token on {tokens}", *tasks, "± is the standard error"])


def final_table(done: dict[str, dict[str, Any]]) -> Table:
    """The table for a terminal."""
    header, body = rows(done)
    table = Table(caption=caption(done), caption_justify="left")
    for index, title in enumerate(header):
        table.add_column(title, justify="left" if index == 0 else "right")
    for row in body:
        table.add_row(*row)
    return table


def write_report(context: Context, parent: Any) -> Path:
    """Write report.html, report.png and results.json beside the run's record, once per result."""
    folder = Path(context.places.local_run(context.run_key))
    results = {"run": context.run_key, "stages": context.done}
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
    """The search and the distillation as a PNG: a bar per candidate, and the winner's training curve."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = context.done
    ranking = done["search"]["ranking"]
    with pyplot.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
        names = [f"{r['num_layers']}L·{r['hidden_size']}·{r['intermediate_size']}" for r in reversed(ranking)]
        colours = ["#76b900" if r["rank"] == 1 else "#9aa5b1" for r in reversed(ranking)]
        left.barh(names, [r["kl_undistilled"] for r in reversed(ranking)], color="#e4e7eb", label="pruned only")
        left.barh(names, [r["kl"] for r in reversed(ranking)], color=colours, label="after its short distillation")
        left.set_xlabel("held-out KL to the teacher, nats per token")
        left.set_title(f"Search: {len(ranking)} candidates, best at the top", loc="left", fontsize=10)
        left.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2)
        curve = storage.read_json(done["distill"]["curve"])
        steps, values = curve["step"], curve["train_kl"]
        table = done["evaluate"]["table"]
        per_step = done["distill"]["tokens"] / context.recipe.distill.steps
        right.plot([step * per_step for step in steps], values, color="#76b900", label="training rows")
        for key, style in (("pruned", ":"), ("distilled", "--")):
            right.axhline(table[key]["kl"], color="#52606d", linestyle=style, label=f"{MODELS[key]}, held-out rows")
        right.set_xlabel("tokens")
        right.set_ylabel("KL to the teacher, nats per token")
        right.set_title("Distillation of the winner", loc="left", fontsize=10)
        right.set_ylim(bottom=0)
        right.legend(frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        pyplot.close(figure)
    return buffer.getvalue()


def page(context: Context) -> str:
    """The run as one self-contained page."""
    import base64

    import jinja2

    done = context.done
    header, body = rows(done)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((data_folder("dashboards") / "report.html.j2").read_text())
    folder = Path(context.places.local_run(context.run_key))
    return template.render(
        recipe=context.recipe,
        run_key=context.run_key,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        header=header,
        body=body,
        caption=caption(done),
        picture=base64.b64encode((folder / "report.png").read_bytes()).decode(),
        ranking=done["search"]["ranking"],
        done=done,
        tracking_uri=shown(context.places.tracking_uri),
    )
