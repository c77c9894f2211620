"""Correct: the teacher learns the text it will be distilled on, where the recipe asks for it and the held-out loss gains.

Plain cross-entropy before distillation (arXiv 2408.11796 section 2.1); without it the teacher stays as it is.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from minitron import storage
from minitron.data import Rows
from minitron.device import DTYPES, device
from minitron.distill import Losses
from minitron.distill.inputs import DistillInputs
from minitron.evaluation import HeldoutMetrics, heldout_metrics
from minitron.models import load_model
from minitron_platform.recipes.build import distill_config
from minitron_platform.recipes.schema import Correct, Training
from minitron_platform.stages.context import Context
from minitron_platform.training.curves import complete_record
from minitron_platform.training.ray_train import TrainTask, train_on_ray
from minitron_platform.training.view import restarts_of, training_view

VERSION = 1
CURVE = "curve.json"


def inputs(context: Context) -> dict[str, Any]:
    asked, training = context.recipe.correct, context.recipe.correction()
    teacher = {"teacher": context.done["teacher"]["id"]}
    if asked is None:
        return teacher
    return {
        **teacher,
        "dtype": context.done["teacher"]["dtype"],
        "train": context.done["data"]["train"],
        "heldout": context.done["data"]["heldout"],
        "correct": asked.model_dump(exclude={"training"}),
        "training": training.model_dump(exclude={"checkpoint_every"}) if training else None,
    }


def run(context: Context, folder: str) -> dict[str, Any]:
    teacher, asked = context.done["teacher"], context.recipe.correct
    if asked is None:
        return {"folder": teacher["folder"], "id": teacher["id"], "corrected": False, "summary": "not asked for"}
    training = context.recipe.correction()
    assert training is not None
    before = _heldout(context, folder, "before", teacher["folder"])
    probe = min(training.steps, asked.probe_steps or max(1, training.steps // 10, 2 * training.warmup_steps))
    if asked.when == "measured":
        gain = before - _after(context, folder, asked, training, "probe", probe)
        if gain < asked.min_gain:
            _forget(folder, "checkpoints")
            return _kept(teacher, before, gain, probe, asked)
    after = _after(context, folder, asked, training, "corrected", None)
    _forget(folder, "checkpoints")
    if asked.when == "measured" and before - after < asked.min_gain:
        _forget(folder, "corrected")
        return _kept(teacher, before, before - after, training.steps, asked)
    corrected = storage.join(folder, "corrected")
    files = storage.manifest(corrected)["files"]
    curve = storage.join(folder, CURVE)
    weights = {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}
    return {
        "folder": corrected,
        **({"curve": curve} if storage.exists(curve) else {}),  # corrections of earlier versions have none
        "id": storage.fingerprint(weights),
        "corrected": True,
        "loss_before": before,
        "loss_after": after,
        "steps": training.steps,
        "restarts": restarts_of(folder),
        "summary": f"{asked.method}, held-out loss {before:.3f} to {after:.3f}",
    }


def record(context: Context, outputs: dict[str, Any]) -> None:
    """The held-out loss before and after and the training curve, in the run's record."""
    if "curve" in outputs:
        training = context.recipe.correction()
        assert training is not None
        tokens = training.batch_rows * context.done["data"]["seq_length"]
        complete_record(context.log("correct"), outputs["curve"], tokens)
    if "loss_before" in outputs:
        context.log("correct").metrics({"heldout_loss": outputs["loss_before"]}, step=0)
        context.log("correct").metrics({"heldout_loss": outputs["loss_after"]}, step=outputs["steps"])


def _kept(teacher: dict[str, Any], before: float, gain: float, steps: int, asked: Correct) -> dict[str, Any]:
    said = f"held-out loss {before:.3f} fell by {gain:.3f} after {steps} steps, less than {asked.min_gain:g}"
    return {
        "folder": teacher["folder"],
        "id": teacher["id"],
        "corrected": False,
        "loss_before": before,
        "loss_after": before - gain,
        "steps": steps,
        "summary": f"the teacher stays as it is: {said}",
    }


def _forget(folder: str, name: str) -> None:
    storage.remove(storage.join(folder, name))


def _after(context: Context, folder: str, asked: Correct, training: Training, name: str, until: int | None) -> float:
    """Held-out loss of the teacher after `until` steps, or after all of them; only the last model is kept."""
    if not storage.exists(storage.join(folder, f"{name}.json")):
        _train(context, folder, asked, training, name, until)
    loss = _heldout(context, folder, name, storage.join(folder, name))
    if until is not None:
        _forget(folder, name)
    return loss


def _train(context: Context, folder: str, asked: Correct, training: Training, name: str, until: int | None) -> None:
    target = storage.join(folder, name)
    if storage.is_committed(target):
        return
    context.console.status("starting Ray")
    resources = context.need_ray()
    teacher = context.done["teacher"]
    view = training_view(context, "correct", folder, until or training.steps)
    context.console.status(view.text)
    task = TrainTask(
        materials=DistillInputs(
            teacher=teacher["folder"],
            teacher_id=teacher["id"],
            dtype=teacher["dtype"],
            rows=context.done["data"]["folder"],
            train_targets="",
            heldout_targets="",
        ),
        config=distill_config(training),
        losses=Losses(logits="none", cross_entropy=1.0),
        fences=tuple(context.held),
        checkpoints=storage.join(folder, "checkpoints"),
        curve=storage.join(folder, CURVE),
        result=target,
        key=folder.rsplit("/", 1)[-1],
        threads=max(1, int(context.recipe.resources.cpus_per_worker)),
        method=asked.method,
        lora_rank=asked.lora_rank,
        until=until,
    )
    train_on_ray(task, resources, view.event, scratch=storage.join(folder, "ray"))


def _heldout(context: Context, folder: str, name: str, model: str) -> float:
    """Held-out loss of a checkpoint, measured once and kept."""
    path = storage.join(folder, f"{name}.json")
    if not storage.exists(path):
        context.console.status("measuring the held-out loss")
        loaded = load_model(storage.fetch(model), DTYPES[context.done["teacher"]["dtype"]]).to(device())
        rows = Rows.open(context.done["data"]["folder"], "heldout")
        found: HeldoutMetrics = heldout_metrics(loaded, rows.take(range(len(rows))))
        storage.write_json(path, asdict(found))
    return float(storage.read_json(path)["loss"])
