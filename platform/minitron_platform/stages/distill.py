"""Distil: the winner of the search, pruned from the teacher again, gets the full distillation on Ray Train."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from minitron import storage
from minitron.architecture import Architecture
from minitron.distill import Losses
from minitron.models import load_tokenizer, save_model
from minitron.pruning.source import PruningSource
from minitron_platform.recipes.build import distill_config, distillation_losses, lm_eval_tasks
from minitron_platform.stages.context import Context
from minitron_platform.stages.targets import materials, origin
from minitron_platform.training.curves import complete_record, write_curve
from minitron_platform.training.ray_train import TrainTask, train_on_ray
from minitron_platform.training.view import restarts_of, training_view

VERSION = 2


def inputs(context: Context) -> dict[str, Any]:
    return {
        "targets": context.done["targets"]["fingerprint"],
        "base": context.base["id"],
        "scores": context.done["calibrate"]["id"],
        "architecture": context.done["search"]["winner"],
        "losses": asdict(_losses(context)[0]),
        "training": context.recipe.distillation(context.member).model_dump(exclude={"checkpoint_every"}),
        **({"teacher": "online"} if context.recipe.targets.mode == "online" else {}),
    }


def _losses(context: Context) -> tuple[Losses, str]:
    student, teacher = context.done["search"]["winner"], context.done["teacher"]["architecture"]
    return distillation_losses(context.recipe, Architecture.from_dict(student), Architecture.from_dict(teacher))


def run(context: Context, folder: str) -> dict[str, Any]:
    recipe, reads, cut = context.recipe, materials(context), origin(context)
    training, (losses, chosen) = recipe.distillation(context.member), _losses(context)
    context.console.say(f"  losses: {chosen}")
    architecture = Architecture.from_dict(context.done["search"]["winner"])
    pruned, student = storage.join(folder, "pruned"), storage.join(folder, "student")
    curve = storage.join(folder, "curve.json")
    if not storage.is_committed(pruned):
        context.console.status("pruning")
        _save_pruned(cut, architecture, reads.teacher, pruned)
    channels = None
    if losses.needs_live_teacher and cut.folder == reads.teacher:
        # what a chained student kept of the teacher's channels is no longer known
        channels = cut.channels(Architecture.from_dict(context.done["teacher"]["architecture"]), architecture)
    if not storage.is_committed(student):
        context.console.status("starting Ray")
        resources = context.need_ray()
        view = training_view(context, "distill", folder, training.steps)
        context.console.status(view.text)
        task = TrainTask(
            materials=reads,
            config=distill_config(training),
            losses=losses,
            fences=tuple(context.held),
            checkpoints=storage.join(folder, "checkpoints"),
            curve=curve,
            result=student,
            key=folder.rsplit("/", 1)[-1],
            threads=max(1, int(recipe.resources.cpus_per_worker)),
            student=pruned,
            channels=channels,
            online=recipe.targets.mode == "online",
            teacher=recipe.targets.teacher,
            tasks_every=training.evaluate_tasks_every,
            tasks=lm_eval_tasks(recipe.evaluate.tasks),
            tasks_batch_rows=recipe.evaluate.batch_rows,
            add_bos=recipe.data.bos,
        )
        train_on_ray(task, resources, view.event, scratch=storage.join(folder, "ray"))
        context.console.status("")
    if not storage.exists(curve):  # by an earlier version, which wrote it after the student, killed in between
        write_curve(storage.join(folder, "checkpoints"), curve)
    storage.remove(storage.join(folder, "checkpoints"))
    weights = {k: v["sha256"] for k, v in storage.manifest(student)["files"].items() if k.endswith(".safetensors")}
    tokens = training.steps * training.batch_rows * context.done["data"]["seq_length"]
    return {
        "pruned": pruned,
        "student": student,
        "curve": curve,
        "id": storage.fingerprint(weights),
        "tokens": tokens,
        "parameters": architecture.num_parameters,
        "architecture": architecture.to_dict(),
        "losses": asdict(losses),
        "losses_chosen": chosen,
        "restarts": restarts_of(folder),
        "summary": f"{tokens:,} tokens · {architecture.num_parameters / 1e6:.1f}M parameters",
    }


def _save_pruned(cut: PruningSource, architecture: Architecture, teacher: str, target: str) -> None:
    model = cut.prune(cut.load(), architecture)
    with storage.committed_folder(target) as place:
        save_model(model, load_tokenizer(storage.fetch(teacher)), place)


def record(context: Context, outputs: dict[str, Any]) -> None:
    """Complete the training curve in the run's record."""
    training, seq_length = context.recipe.distillation(context.member), context.done["data"]["seq_length"]
    complete_record(context.log("distill"), outputs["curve"], training.batch_rows * seq_length)
