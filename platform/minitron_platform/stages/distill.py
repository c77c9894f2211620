"""Distil: the winner of the search, pruned from the teacher again, gets the full distillation on Ray Train."""

from __future__ import annotations

from typing import Any

from minitron import storage
from minitron.architecture import Architecture
from minitron.models import load_tokenizer, save_model
from minitron_platform.console import seconds
from minitron_platform.context import Context
from minitron_platform.spool import RunLog, read_curve, read_events
from minitron_platform.stages.targets import materials
from minitron_platform.training import DistillTask, distill_config, train_on_ray

VERSION = 1


def inputs(context: Context) -> dict[str, Any]:
    return {
        "targets": context.done["targets"]["fingerprint"],
        "scores": context.done["calibrate"]["id"],
        "architecture": context.done["search"]["winner"],
        "training": context.recipe.distill.model_dump(exclude={"checkpoint_every"}),
    }


def run(context: Context, folder: str) -> dict[str, Any]:
    recipe, reads = context.recipe, materials(context)
    architecture = Architecture.from_dict(context.done["search"]["winner"])
    pruned, student = storage.join(folder, "pruned"), storage.join(folder, "student")
    if not storage.is_committed(pruned):
        context.console.status("pruning the teacher")
        model = reads.prune(reads.load_teacher(), architecture)
        with storage.committed_folder(pruned) as place:
            save_model(model, load_tokenizer(storage.fetch(reads.teacher)), place)
    if not storage.is_committed(student):
        context.console.status("starting Ray")
        context.need_ray()
        log = context.log("distill")
        context.console.status(_Tail(log, recipe.distill.steps).text)
        task = DistillTask(
            materials=reads,
            architecture=architecture.to_dict(),
            config=distill_config(recipe.distill),
            checkpoints=storage.join(folder, "checkpoints"),
            student=student,
            key=folder.rsplit("/", 1)[-1],
            threads=max(1, int(recipe.resources.cpus_per_worker)),
        )
        train_on_ray(task, recipe.resources, log, scratch=storage.join(folder, "ray"))
        context.console.status("")
    storage.remove(storage.join(folder, "checkpoints"))
    curve = storage.join(folder, "curve.json")
    if not storage.exists(curve):
        steps, values = read_curve(context.log("distill"), "train_kl")
        storage.write_json(curve, {"step": steps, "train_kl": values})
    weights = {k: v["sha256"] for k, v in storage.manifest(student)["files"].items() if k.endswith(".safetensors")}
    tokens = recipe.distill.steps * recipe.distill.batch_rows * context.done["data"]["seq_length"]
    return {
        "pruned": pruned,
        "student": student,
        "curve": curve,
        "id": storage.fingerprint(weights),
        "tokens": tokens,
        "parameters": architecture.num_parameters,
        "architecture": architecture.to_dict(),
        "summary": f"{tokens:,} tokens · {architecture.num_parameters / 1e6:.1f}M parameters",
    }


def record(context: Context, outputs: dict[str, Any]) -> None:
    """Write the training curve into a record that does not have it, because another run did the work."""
    log, curve = context.log("distill"), storage.read_json(outputs["curve"])
    if not read_curve(log, "train_kl")[0]:
        for step, value in zip(curve["step"], curve["train_kl"], strict=True):
            log.metrics({"train_kl": value}, step=step)


class _Tail:
    """The newest metrics that workers appended to a run's record, as one line."""

    def __init__(self, log: RunLog, steps: int) -> None:
        self.path, self.steps, self.offset = log.path, steps, 0
        if self.path.exists():
            self.offset = self.path.stat().st_size
        self.latest = ""

    def text(self) -> str:
        if self.path.exists():
            for event, offset in read_events(self.path, self.offset):
                self.offset = offset
                if event and event["event"] == "metrics" and "tokens" in event["values"]:
                    numbers, step = event["values"], event["step"]
                    per_step = numbers["tokens"] / step / numbers["tokens_per_second"]
                    self.latest = (
                        f"step {step}/{self.steps} · KL {numbers['train_kl']:.3f} · "
                        f"{numbers['tokens_per_second']:.0f} tokens/s · {seconds(per_step * (self.steps - step))} left"
                    )
        return self.latest or "starting workers"
