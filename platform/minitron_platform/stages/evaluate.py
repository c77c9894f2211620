"""Evaluate: teacher, pruned-only and distilled student on the same held-out rows, benchmarks and clock."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from torch import nn

from minitron import storage
from minitron.device import DTYPES, device
from minitron.evaluation import evaluate, interleaved_throughput
from minitron.evaluation.documents import documents_identity
from minitron.evaluation.metrics import KL, LOSS
from minitron.logits import Head
from minitron.models import load_model, load_tokenizer
from minitron_platform.context import Context
from minitron_platform.stages.targets import materials
from minitron_platform.tasks import lm_eval_tasks

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
    context.console.status("measuring throughput")
    speeds = interleaved_throughput(models, seq_length=done["data"]["seq_length"], batch_rows=4, seconds=4.0)
    for name in MODELS:
        table[name]["tokens_per_second"] = speeds[name].tokens_per_second
        table[name]["tokens_per_second_spread"] = speeds[name].spread
        table[name]["parameters"] = models[name].num_parameters()  # type: ignore[operator]
    pruned, distilled = table["pruned"], table["distilled"]
    return {
        "table": table,
        "summary": f"KL to the teacher: pruned {pruned['kl']:.3f}, distilled {distilled['kl']:.3f}",
    }


def _quality(context: Context, name: str, models: dict[str, nn.Module], folder: str) -> dict[str, Any]:
    """One model's held-out metrics and benchmark scores, measured once and kept."""
    path = storage.join(folder, f"{name}.json")
    if name == "teacher":  # the same for the whole family
        key = {"targets": context.done["targets"]["fingerprint"], "version": VERSION, **_questions(context)}
        path = storage.join(context.places.storage, "quality", f"{storage.fingerprint(key)}.json")
    if not storage.exists(path):
        context.console.status(f"{name}: held-out rows")
        heldout = materials(context).heldout(models[name], Head.of(models["teacher"]))
        context.console.status(f"{name}: preparing benchmarks")
        count = context.console.counter("documents")
        scores = evaluate(
            models[name],
            load_tokenizer(storage.fetch(context.done["teacher"]["folder"])),
            lm_eval_tasks(context.recipe.evaluate.tasks),
            batch_size=context.recipe.evaluate.batch_rows,
            add_bos=context.recipe.data.bos,
            progress=count,
        )
        values = {
            "loss": heldout.loss,
            "kl": heldout.kl,
            "top1_agreement": heldout.top1_agreement,
            "heldout_tokens": heldout.tokens,
            "tasks": {task: asdict(score) for task, score in scores.items()},
        }
        storage.write_json(path, values)
        line = [f"{task} {score.shown_as.sentence(score.value, score.stderr)}" for task, score in scores.items()]
        figures = [f"loss {LOSS.text(heldout.loss)}", f"KL {KL.text(heldout.kl or 0.0)}", *line]
        context.console.say(f"  {name}: {' · '.join(figures)}")
    found: dict[str, Any] = storage.read_json(path)
    return found
