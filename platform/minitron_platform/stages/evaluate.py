"""Evaluate: teacher, pruned-only and distilled student on the same held-out rows, benchmarks and clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from rich.markup import escape
from torch import nn

from minitron import storage
from minitron.device import DTYPES, device
from minitron.errors import one_line
from minitron.evaluation import Score, Task, evaluate, interleaved_throughput
from minitron.evaluation.documents import documents_identity
from minitron.evaluation.metrics import KL, LOSS
from minitron.logits import Head
from minitron.models import load_model, load_tokenizer
from minitron_platform.recipes.build import lm_eval_tasks
from minitron_platform.stages.context import Context
from minitron_platform.stages.targets import materials

VERSION = 2
MODELS = ("teacher", "pruned", "distilled")


def inputs(context: Context) -> dict[str, Any]:
    return {
        "student": context.done["distill"]["id"],
        "targets": context.done["targets"]["fingerprint"],
        "base": context.base["id"],
        "scores": context.done["calibrate"]["id"],
        **_questions(context),
    }


def _questions(context: Context) -> dict[str, Any]:
    """All that decides a model's figures beside the model."""
    return {
        "evaluate": context.recipe.evaluate.model_dump(exclude={"batch_rows"}),
        "documents": [documents_identity(task.data) for task in context.recipe.evaluate.tasks if task.data],
        "lm_eval": version("lm_eval"),
    }


def holds(context: Context, outputs: dict[str, Any]) -> bool:
    """Whether no benchmark failed; those that did are tried again, alone."""
    return not failures(outputs)


def failures(outputs: dict[str, Any]) -> dict[str, str]:
    """Why benchmarks failed, by "MODEL.TASK"."""
    return {
        f"{model}.{task}": reason
        for model, row in outputs["table"].items()
        for task, reason in row.get("failures", {}).items()
    }


def record(context: Context, outputs: dict[str, Any]) -> None:
    """Tag the stage's run with the benchmarks that failed."""
    failed = [f"{where}: {reason}" for where, reason in failures(outputs).items()]
    context.log("evaluate").tags({"minitron.failed_benchmarks": "; ".join(failed) or "none"})


def run(context: Context, folder: str) -> dict[str, Any]:
    done, dtype = context.done, DTYPES[context.done["teacher"]["dtype"]]
    folders = {
        "teacher": done["correct"]["folder"],
        "pruned": done["distill"]["pruned"],
        "distilled": done["distill"]["student"],
    }
    models: dict[str, nn.Module] = {}
    for name, place in folders.items():
        context.console.status(f"loading the {name} model")
        models[name] = load_model(storage.fetch(place), dtype).to(device())
    table: dict[str, dict[str, Any]] = {name: _quality(context, name, models, folder) for name in MODELS}
    speeds = _speeds(context, models, storage.join(folder, "throughput.json"))
    for name in MODELS:
        table[name]["tokens_per_second"] = speeds[name]["tokens_per_second"]
        table[name]["tokens_per_second_spread"] = speeds[name]["spread"]
        table[name]["parameters"] = models[name].num_parameters()  # type: ignore[operator]
    pruned, distilled = table["pruned"], table["distilled"]
    failed = failures({"table": table})
    missing = f" · failed and tried again by the next run: {', '.join(failed)}" if failed else ""
    return {
        "table": table,
        "summary": f"KL to the teacher: pruned {KL.text(pruned['kl'])}, distilled {KL.text(distilled['kl'])}{missing}",
    }


def _speeds(context: Context, models: dict[str, nn.Module], path: str) -> dict[str, Any]:
    """Every model's throughput, measured once and kept."""
    if not storage.exists(path):
        context.console.status("measuring throughput")
        speeds = interleaved_throughput(
            models, seq_length=context.done["data"]["seq_length"], batch_rows=4, seconds=4.0
        )
        storage.write_json(path, {name: asdict(speed) for name, speed in speeds.items()})
    found: dict[str, Any] = storage.read_json(path)
    return found


def _quality(context: Context, name: str, models: dict[str, nn.Module], folder: str) -> dict[str, Any]:
    """One model's held-out metrics and benchmark scores, measured once and kept."""
    path = storage.join(folder, f"{name}.json")
    if name == "teacher":  # the same for the whole family
        key = {"targets": context.done["targets"]["fingerprint"], "version": VERSION, **_questions(context)}
        path = storage.join(context.places.storage, "quality", f"{storage.fingerprint(key)}.json")
    tasks = lm_eval_tasks(context.recipe.evaluate.tasks)
    found: dict[str, Any] | None = storage.read_json(path) if storage.exists(path) else None
    missing = [task for task in tasks if found is None or task.name not in found["tasks"]]
    if found is not None and not missing:
        return found
    figures = []
    if found is None:
        context.console.status(f"{name}: held-out rows")
        heldout = materials(context).heldout(models[name], Head.of(models["teacher"]))
        found = {
            "loss": heldout.loss,
            "kl": heldout.kl,
            "top1_agreement": heldout.top1_agreement,
            "heldout_tokens": heldout.tokens,
            "tasks": {},
        }
        storage.write_json(path, found)
        figures = [f"loss {LOSS.text(heldout.loss)}", f"KL {KL.text(heldout.kl or 0.0)}"]
    if missing:
        scores, found["failures"] = _scores(context, name, models[name], missing)
        known = found["tasks"] | {task: asdict(score) for task, score in scores.items()}
        found["tasks"] = {task.name: known[task.name] for task in tasks if task.name in known}
        storage.write_json(path, found)
        figures += [f"{task} {score.shown_as.sentence(score.value, score.stderr)}" for task, score in scores.items()]
    if figures:
        context.console.say(f"  {name}: {' · '.join(figures)}")
    return found


def _scores(
    context: Context, name: str, model: nn.Module, tasks: Sequence[Task]
) -> tuple[dict[str, Score], dict[str, str]]:
    """Scores of the tasks, and the reasons of those that failed, which are said."""
    context.console.status(f"{name}: preparing benchmarks")
    failed: dict[str, str] = {}

    def fail(task: str, error: Exception) -> None:
        failed[task] = one_line(error)
        context.console.say(f"  [yellow]{name}: {task} failed and is left out: {escape(failed[task])}[/]")

    scores = evaluate(
        model,
        load_tokenizer(storage.fetch(context.done["teacher"]["folder"])),
        tasks,
        batch_size=context.recipe.evaluate.batch_rows,
        add_bos=context.recipe.data.bos,
        progress=context.console.counter("documents"),
        on_failure=fail,
    )
    return scores, failed
