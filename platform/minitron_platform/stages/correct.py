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
from minitron_platform.estimates.memory import correction_memory
from minitron_platform.estimates.outlook import MASTER_BYTES, Estimate, Outlook
from minitron_platform.recipes import schema
from minitron_platform.recipes.build import distill_config
from minitron_platform.stages.context import Context
from minitron_platform.stages.data import Data
from minitron_platform.stages.stage import ArtifactPath, Stage, StageOutput
from minitron_platform.stages.state import RunState
from minitron_platform.stages.teacher import Teacher, TeacherOutput, weight_hashes
from minitron_platform.stages.trainings import restarts_of, training_view
from minitron_platform.tracking.restarts import Restart
from minitron_platform.training.curves import complete_record
from minitron_platform.training.ray_train import TrainTask, train_on_ray

CURVE = "curve.json"


class CorrectOutput(StageOutput):
    folder: ArtifactPath
    """The teacher to distil from: corrected, or as it was."""
    id: str
    corrected: bool
    curve: ArtifactPath | None = None
    """Of a correction that was kept."""
    loss_before: float | None = None
    """On held-out rows, nats per token; None where no correction was tried."""
    loss_after: float | None = None
    steps: int | None = None
    """After which `loss_after` was measured."""
    restarts: tuple[Restart, ...] = ()


class Correct(Stage[CorrectOutput]):
    name = "correct"
    version = 1
    per_model = False
    output_type = CorrectOutput

    def inputs(self, state: RunState) -> dict[str, Any]:
        settings, training = state.recipe.correct, state.recipe.correction()
        teacher = {"teacher": state.output(Teacher).id}
        if settings is None:
            return teacher
        data = state.output(Data)
        return {
            **teacher,
            "dtype": state.output(Teacher).dtype,
            "train": data.train,
            "heldout": data.heldout,
            "correct": settings.model_dump(exclude={"training"}),
            "training": training.model_dump(exclude={"checkpoint_every"}) if training else None,
        }

    def estimate(self, outlook: Outlook, member: schema.Member | None) -> Estimate:
        recipe, teacher = outlook.recipe, outlook.teacher
        settings, training = recipe.correct, recipe.correction()
        if settings is None or training is None:
            return Estimate("not asked for")
        tokens = training.steps * training.batch_rows * recipe.data.seq_length
        # at the probe there is a checkpoint in any case; of norms and adapters it is next to nothing
        checkpoints = 3 * MASTER_BYTES if settings.method == "full" else 0
        memory = correction_memory(recipe, teacher, outlook.value_bytes, outlook.resources.workers)
        return Estimate(
            f"{settings.method}, at most {tokens:,} tokens, {settings.when}",
            flops=3.0 * tokens * teacher.flops_per_token(recipe.data.seq_length),
            bytes=(checkpoints + 2 * outlook.value_bytes) * teacher.num_parameters,
            memory=memory,
        )

    def run(self, context: Context, folder: str) -> CorrectOutput:
        teacher, settings = context.output(Teacher), context.recipe.correct
        if settings is None:
            return CorrectOutput(folder=teacher.folder, id=teacher.id, corrected=False, summary="not asked for")
        training = context.recipe.correction()
        assert training is not None
        before = _heldout(context, folder, "before", teacher.folder)
        probe = min(training.steps, settings.probe_steps or max(1, training.steps // 10, 2 * training.warmup_steps))
        if settings.when == "measured":
            gain = before - _after(context, folder, settings, training, "probe", probe)
            if gain < settings.min_gain:
                _forget(folder, "checkpoints")
                return _kept(teacher, before, gain, probe, settings)
        after = _after(context, folder, settings, training, "corrected", None)
        _forget(folder, "checkpoints")
        if settings.when == "measured" and before - after < settings.min_gain:
            _forget(folder, "corrected")
            return _kept(teacher, before, before - after, training.steps, settings)
        corrected = storage.join(folder, "corrected")
        curve = storage.join(folder, CURVE)
        return CorrectOutput(
            folder=corrected,
            id=storage.fingerprint(weight_hashes(corrected)),
            corrected=True,
            curve=curve if storage.exists(curve) else None,  # corrections of earlier versions have none
            loss_before=before,
            loss_after=after,
            steps=training.steps,
            restarts=tuple(restarts_of(folder)),
            summary=f"{settings.method}, held-out loss {before:.3f} to {after:.3f}",
        )

    def record(self, context: Context, output: CorrectOutput) -> None:
        """The held-out loss before and after and the training curve."""
        if output.curve is not None:
            training = context.recipe.correction()
            assert training is not None
            complete_record(context.log(self.name), output.curve, training.batch_rows * context.output(Data).seq_length)
        if output.loss_before is not None and output.loss_after is not None and output.steps is not None:
            context.log(self.name).metrics({"heldout_loss": output.loss_before}, step=0)
            context.log(self.name).metrics({"heldout_loss": output.loss_after}, step=output.steps)


def _kept(teacher: TeacherOutput, before: float, gain: float, steps: int, settings: schema.Correct) -> CorrectOutput:
    said = f"held-out loss {before:.3f} fell by {gain:.3f} after {steps} steps, less than {settings.min_gain:g}"
    return CorrectOutput(
        folder=teacher.folder,
        id=teacher.id,
        corrected=False,
        loss_before=before,
        loss_after=before - gain,
        steps=steps,
        summary=f"the teacher stays as it is: {said}",
    )


def _forget(folder: str, name: str) -> None:
    storage.remove(storage.join(folder, name))


def _after(
    context: Context, folder: str, settings: schema.Correct, training: schema.Training, name: str, until: int | None
) -> float:
    """Held-out loss of the teacher after `until` steps, or after all of them; only the last model is kept."""
    if not storage.exists(storage.join(folder, f"{name}.json")):
        _train(context, folder, settings, training, name, until)
    loss = _heldout(context, folder, name, storage.join(folder, name))
    if until is not None:
        _forget(folder, name)
    return loss


def _train(
    context: Context, folder: str, settings: schema.Correct, training: schema.Training, name: str, until: int | None
) -> None:
    target = storage.join(folder, name)
    if storage.is_committed(target):
        return
    context.console.status("starting Ray")
    resources = context.ensure_ray()
    teacher = context.output(Teacher)
    view = training_view(context, "correct", folder, until or training.steps)
    context.console.status(view.text)
    task = TrainTask(
        materials=DistillInputs(
            teacher=teacher.folder,
            teacher_id=teacher.id,
            dtype=teacher.dtype,
            rows=context.output(Data).folder,
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
        method=settings.method,
        lora_rank=settings.lora_rank,
        until=until,
    )
    train_on_ray(task, resources, view.event, scratch=storage.join(folder, "ray"))


def _heldout(context: Context, folder: str, name: str, model: str) -> float:
    """Held-out loss of a checkpoint, measured once and kept."""
    path = storage.join(folder, f"{name}.json")
    if not storage.exists(path):
        context.console.status("measuring the held-out loss")
        loaded = load_model(storage.fetch(model), DTYPES[context.output(Teacher).dtype]).to(device())
        rows = Rows.open(context.output(Data).folder, "heldout")
        found: HeldoutMetrics = heldout_metrics(loaded, rows.take(range(len(rows))))
        storage.write_json(path, asdict(found))
    return float(storage.read_json(path)["loss"])
