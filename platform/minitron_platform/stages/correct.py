"""Correct: fine-tune the teacher on the text before distilling from it, if the recipe says so and the held-out loss falls.

The loss is the cross-entropy with the next token (arXiv 2408.11796 section 2.1). Otherwise the teacher is kept unchanged.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from minitron import storage
from minitron.data import Rows
from minitron.device import DTYPES
from minitron.distill import Losses
from minitron.distill.inputs import DistillInputs
from minitron.evaluation import HeldoutMetrics, heldout_metrics
from minitron_platform.estimates.gpu import correction_on_gpus
from minitron_platform.estimates.memory import corrected_share, correction_memory
from minitron_platform.estimates.node_memory import training_work
from minitron_platform.estimates.outlook import MASTER_BYTES, Estimate, Outlook
from minitron_platform.estimates.phases import correction_parts
from minitron_platform.recipes import schema
from minitron_platform.recipes.build import training_identity
from minitron_platform.stages.context import Context
from minitron_platform.stages.data import Data
from minitron_platform.stages.stage import ArtifactPath, Stage, StageOutput
from minitron_platform.stages.state import RunState
from minitron_platform.stages.teacher import Teacher, TeacherOutput, weight_hashes
from minitron_platform.stages.trainings import training_settings, training_view
from minitron_platform.training.curves import complete_record
from minitron_platform.workers import models
from minitron_platform.workers.worker import Worker

CURVE = "curve.json"


class CorrectOutput(StageOutput):
    folder: ArtifactPath
    """Checkpoint of the teacher to distil from, corrected or unchanged."""
    id: str
    """Content address of that teacher."""
    corrected: bool
    curve: ArtifactPath | None = None
    """Training curve of the correction; None if it was not kept."""
    loss_before: float | None = None
    """Held-out loss before the correction in nats per token; None if no correction was tried."""
    loss_after: float | None = None
    """Held-out loss after `steps` steps of the correction."""
    steps: int | None = None


class Correct(Stage[CorrectOutput]):
    name = "correct"
    version = 1
    per_model = False
    output_type = CorrectOutput

    def inputs(self, state: RunState) -> dict[str, Any]:
        settings = state.recipe.correct
        training = state.recipe.correction()
        teacher = {"teacher": state.output(Teacher).id}
        if settings is None:
            return teacher
        data = state.output(Data)
        return {
            **teacher,
            "dtype": state.output(Teacher).dtype,
            "train": data.train,
            "heldout": data.heldout,
            **state.attention(),
            "correct": settings.model_dump(exclude={"training"}),
            "training": training_identity(training) if training else None,
        }

    def estimate(self, outlook: Outlook, member: schema.Member | None) -> Estimate:
        recipe = outlook.recipe
        teacher = outlook.teacher
        settings = recipe.correct
        training = recipe.correction()
        if settings is None or training is None:
            return Estimate("none in the recipe")
        tokens = training.steps * training.batch_rows * recipe.data.seq_length
        share = corrected_share(settings, teacher)
        checkpoints = 3 * MASTER_BYTES * share  # the probe always writes one
        memory = correction_memory(recipe, teacher, outlook.value_bytes, outlook.resources.workers)
        gpu = correction_on_gpus(recipe, teacher, outlook.value_bytes, outlook.resources)
        return Estimate(
            f"{settings.method}, at most {tokens:,} tokens, {settings.when}",
            bytes=int((checkpoints + 2 * outlook.value_bytes) * teacher.num_parameters),
            memory=memory,
            gpu=gpu,
            node=training_work(gpu),
            parts=correction_parts(outlook, gpu),
        )

    def run(self, context: Context, folder: str) -> CorrectOutput:
        teacher = context.output(Teacher)
        settings = context.recipe.correct
        if settings is None:
            return CorrectOutput(folder=teacher.folder, id=teacher.id, corrected=False, summary="none in the recipe")
        training = context.recipe.correction()
        assert training is not None
        correction = _Correction(context, folder, settings, training)
        before = correction.heldout_loss("before", teacher.folder)
        if settings.when == "measured":
            default_probe = max(1, training.steps // 10, 2 * training.warmup_steps)
            probe = min(training.steps, settings.probe_steps or default_probe)
            gain = before - correction.loss_after_training("probe", probe)
            correction.remove("probe")
            if gain < settings.min_gain:
                correction.remove("checkpoints")
                return _unchanged(teacher, before, gain, probe, settings)
        after = correction.loss_after_training("corrected", None)
        correction.remove("checkpoints")
        if settings.when == "measured" and before - after < settings.min_gain:
            correction.remove("corrected")
            return _unchanged(teacher, before, before - after, training.steps, settings)
        corrected = storage.join(folder, "corrected")
        curve = storage.join(folder, CURVE)
        return CorrectOutput(
            folder=corrected,
            id=storage.fingerprint(weight_hashes(corrected)),
            corrected=True,
            curve=curve if storage.exists(curve) else None,  # earlier versions wrote none
            loss_before=before,
            loss_after=after,
            steps=training.steps,
            summary=f"{settings.method}, held-out loss {before:.3f} to {after:.3f}",
        )

    def record(self, context: Context, output: CorrectOutput) -> None:
        """Add the held-out loss before and after, and the steps of the training curve that the record lacks."""
        log = context.log(self.name)
        if output.curve is not None:
            training = context.recipe.correction()
            assert training is not None
            complete_record(log, output.curve, training.batch_rows * context.output(Data).seq_length)
        if output.loss_before is not None and output.loss_after is not None and output.steps is not None:
            log.metrics({"heldout_loss": output.loss_before}, step=0)
            log.metrics({"heldout_loss": output.loss_after}, step=output.steps)


def _unchanged(
    teacher: TeacherOutput, before: float, gain: float, steps: int, settings: schema.Correct
) -> CorrectOutput:
    """The output for a correction that is not kept, because the held-out loss fell too little."""
    reason = f"held-out loss {before:.3f} fell by {gain:.3f} after {steps} steps, less than {settings.min_gain:g}"
    return CorrectOutput(
        folder=teacher.folder,
        id=teacher.id,
        corrected=False,
        loss_before=before,
        loss_after=before - gain,
        steps=steps,
        summary=f"the teacher is kept unchanged: {reason}",
    )


@dataclass(frozen=True)
class _Measurement:
    """A checkpoint to measure on the held-out rows in the folder `rows`."""

    checkpoint: str
    dtype: str
    rows: str
    separate_documents: bool


def _heldout(task: _Measurement, worker: Worker) -> HeldoutMetrics:
    """Held-out loss, by all processes together."""
    worker.progress.status("measuring the held-out loss")
    model = models.load(worker, task.checkpoint, task.dtype)
    rows = Rows.open(task.rows, "heldout")
    documents = rows.boundaries if task.separate_documents else None
    return heldout_metrics(model, rows.take(range(len(rows))), documents=documents, together=worker.count > 1)


@dataclass(frozen=True)
class _Correction:
    """A correction in the stage's `folder`. Each of its parts has a name, under which models and losses are stored."""

    context: Context
    folder: str
    settings: schema.Correct
    training: schema.Training

    def loss_after_training(self, name: str, until: int | None) -> float:
        """Held-out loss of the teacher after `until` steps, or after all of them."""
        if not storage.exists(self._loss_file(name)):
            self._train(name, until)
        return self.heldout_loss(name, storage.join(self.folder, name))

    def heldout_loss(self, name: str, checkpoint: str) -> float:
        """Held-out loss of a checkpoint in nats per token; measured once and stored."""
        path = self._loss_file(name)
        if not storage.exists(path):
            measurement = _Measurement(
                checkpoint=checkpoint,
                dtype=self.context.output(Teacher).dtype,
                rows=self.context.output(Data).folder,
                separate_documents=self.context.separate_documents,
            )
            measured = self.context.workers.compute(_heldout, measurement)
            self.context.check_fences()
            storage.write_json(path, asdict(measured))
        return float(storage.read_json(path)["loss"])

    def remove(self, name: str) -> None:
        """Remove what is stored under `name` in the stage's folder, if it exists."""
        self.context.check_fences()
        storage.remove(storage.join(self.folder, name))

    def _loss_file(self, name: str) -> str:
        return storage.join(self.folder, f"{name}.json")

    def _train(self, name: str, until: int | None) -> None:
        """Train the teacher up to step `until`, or to the end, and commit it under `name`."""
        target = storage.join(self.folder, name)
        if storage.is_committed(target):
            return
        from minitron_platform.training.train import TrainTask, train

        context = self.context
        resources = context.ensure_ray()
        teacher = context.output(Teacher)
        on_gpus = correction_on_gpus(context.recipe, teacher.architecture, DTYPES[teacher.dtype].itemsize, resources)
        config, _ = training_settings(context, "correct", self.training, on_gpus)
        view = training_view(context, "correct", self.folder, until or self.training.steps)
        context.console.status(view.text)
        task = TrainTask(
            materials=DistillInputs(
                teacher=teacher.folder,
                teacher_id=teacher.id,
                dtype=teacher.dtype,
                rows=context.output(Data).folder,
                train_targets="",
                heldout_targets="",
                separate_documents=context.separate_documents,
            ),
            config=config,
            losses=Losses(logits="none", cross_entropy=1.0),
            checkpoints=storage.join(self.folder, "checkpoints"),
            curve=storage.join(self.folder, CURVE),
            result=target,
            key=self.folder.rsplit("/", 1)[-1],
            method=self.settings.method,
            lora_rank=self.settings.lora_rank,
            until=until,
        )
        context.workers.train(train, task, view.event)
