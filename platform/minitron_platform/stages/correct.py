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
from minitron.distill.materials import Materials
from minitron.evaluation import HeldoutMetrics, heldout_metrics
from minitron.models import load_model
from minitron_platform.context import Context
from minitron_platform.recipe import Correct
from minitron_platform.stages.distill import Tail
from minitron_platform.training import TrainTask, distill_config, train_on_ray

VERSION = 1


def inputs(context: Context) -> dict[str, Any]:
    asked = context.recipe.correct
    teacher = {"teacher": context.done["teacher"]["id"]}
    if asked is None:
        return teacher
    return {
        **teacher,
        "dtype": context.done["teacher"]["dtype"],
        "train": context.done["data"]["train"],
        "heldout": context.done["data"]["heldout"],
        "correct": asked.model_dump(exclude={"training": {"checkpoint_every"}}),
    }


def run(context: Context, folder: str) -> dict[str, Any]:
    teacher, asked = context.done["teacher"], context.recipe.correct
    if asked is None:
        return {"folder": teacher["folder"], "id": teacher["id"], "corrected": False, "summary": "not asked for"}
    before = _heldout(context, folder, "before", teacher["folder"])
    probe = min(asked.training.steps, asked.probe_steps or max(1, asked.training.steps // 10))
    if asked.when == "measured":
        probed = _train(context, folder, asked, "probe", probe)
        gain = before - _heldout(context, folder, "probe", probed)
        if gain < asked.min_gain:
            return _kept(teacher, before, gain, f"after {probe} steps", asked)
    corrected = _train(context, folder, asked, "corrected", None)
    storage.remove(storage.join(folder, "checkpoints"))
    after = _heldout(context, folder, "after", corrected)
    if asked.when == "measured" and before - after < asked.min_gain:
        return _kept(teacher, before, before - after, f"after all {asked.training.steps} steps", asked)
    files = storage.manifest(corrected)["files"]
    weights = {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}
    return {
        "folder": corrected,
        "id": storage.fingerprint(weights),
        "corrected": True,
        "loss_before": before,
        "loss_after": after,
        "summary": f"{asked.method}, held-out loss {before:.3f} to {after:.3f}",
    }


def _kept(teacher: dict[str, Any], before: float, gain: float, when: str, asked: Correct) -> dict[str, Any]:
    said = f"held-out loss {before:.3f} fell by {gain:.3f} {when}, less than {asked.min_gain:g}"
    return {
        "folder": teacher["folder"],
        "id": teacher["id"],
        "corrected": False,
        "loss_before": before,
        "loss_after": before - gain,
        "summary": f"the teacher stays as it is: {said}",
    }


def _train(context: Context, folder: str, asked: Correct, name: str, until: int | None) -> str:
    """The folder of the teacher after `until` steps, or after all of them."""
    target = storage.join(folder, name)
    if storage.is_committed(target):
        return target
    context.console.status("starting Ray")
    context.need_ray()
    log, teacher = context.log("correct"), context.done["teacher"]
    context.console.status(Tail(log, asked.training.steps).text)
    task = TrainTask(
        materials=Materials(
            teacher=teacher["folder"],
            teacher_id=teacher["id"],
            dtype=teacher["dtype"],
            rows=context.done["data"]["folder"],
            train_targets="",
            heldout_targets="",
        ),
        config=distill_config(asked.training),
        losses=Losses(logits="none", cross_entropy=1.0),
        checkpoints=storage.join(folder, "checkpoints"),
        result=target,
        key=folder.rsplit("/", 1)[-1],
        threads=max(1, int(context.recipe.resources.cpus_per_worker)),
        method=asked.method,
        lora_rank=asked.lora_rank,
        until=until,
    )
    train_on_ray(task, context.recipe.resources, log, scratch=storage.join(folder, "ray"))
    return target


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
