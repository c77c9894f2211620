"""Distill: prune the winner of the search again and distil it in full on Ray Train."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from minitron import storage
from minitron.architecture import Architecture
from minitron.device import DTYPES
from minitron.distill import Losses
from minitron.processes import largest
from minitron.pruning.source import PruningSource
from minitron_platform.estimates.gpu import TEACHER, distillation_on_gpus
from minitron_platform.estimates.memory import distillation_memory
from minitron_platform.estimates.node_memory import training_work
from minitron_platform.estimates.outlook import MASTER_BYTES, Estimate, Outlook
from minitron_platform.estimates.phases import distillation_parts
from minitron_platform.estimates.teacher import runs_live_teacher
from minitron_platform.recipes import schema
from minitron_platform.recipes.build import distillation_losses, training_identity, training_tasks
from minitron_platform.stages.base import pruning_base
from minitron_platform.stages.calibrate import Calibrate
from minitron_platform.stages.context import Context
from minitron_platform.stages.data import Data
from minitron_platform.stages.search import Search
from minitron_platform.stages.stage import ArtifactPath, Stage, StudentOutput
from minitron_platform.stages.state import RunState
from minitron_platform.stages.targets import Targets, distill_inputs, pruning_source
from minitron_platform.stages.teacher import Teacher, weight_hashes
from minitron_platform.stages.trainings import training_settings, training_view
from minitron_platform.training.curves import complete_record, write_curve
from minitron_platform.workers.worker import Worker


class DistillOutput(StudentOutput):
    pruned: ArtifactPath
    """Checkpoint of the student before its distillation."""
    curve: ArtifactPath
    """The training curve, see `minitron_platform.training.curves`."""
    tokens: int
    """Number of tokens that the student was trained on."""
    parameters: int
    losses: dict[str, Any]
    """`minitron.distill.Losses` as a dict."""
    losses_chosen: str
    """Why these losses were chosen, as a sentence."""


class Distill(Stage[DistillOutput]):
    name = "distill"
    version = 2
    per_model = True
    output_type = DistillOutput

    def recipe_key(self, recipe: schema.Recipe, member: schema.Member | None) -> str:
        """The model's own section if it has one."""
        return f"{recipe.key(member)}.distill" if member and member.distill else "distill"

    def inputs(self, state: RunState) -> dict[str, Any]:
        return {
            "targets": state.output(Targets).fingerprint,
            "base": pruning_base(state).id,
            "scores": state.output(Calibrate).id,
            "architecture": state.output(Search).winner.to_dict(),
            "losses": asdict(_losses(state)[0]),
            "training": training_identity(state.recipe.distillation(state.member)),
            **({"teacher": "online"} if state.recipe.targets.mode == "online" else {}),
        }

    def estimate(self, outlook: Outlook, member: schema.Member | None) -> Estimate:
        assert member is not None
        recipe, workers = outlook.recipe, outlook.resources.workers
        training = recipe.distillation(member)
        tokens = training.steps * training.batch_rows * recipe.data.seq_length
        largest = outlook.largest(member)
        live_teacher = runs_live_teacher(outlook.losses[member.model], recipe.targets.mode)
        checkpoints = 3 * MASTER_BYTES if training.checkpoint_every else 0
        gpu = distillation_on_gpus(
            recipe,
            member,
            outlook.teacher,
            largest,
            outlook.value_bytes,
            outlook.resources,
            outlook.losses[member.model],
        )
        return Estimate(
            f"{tokens:,} tokens on {workers} worker{'s' if workers > 1 else ''}"
            + (", running the teacher" if live_teacher else ""),
            bytes=(checkpoints + 2 * outlook.value_bytes) * largest.num_parameters,
            start_up_seconds=20,
            memory=distillation_memory(
                recipe,
                member,
                outlook.teacher,
                largest,
                outlook.value_bytes,
                workers=workers,
                live_teacher=live_teacher,
            ),
            gpu=gpu,
            node=training_work(gpu),
            parts=distillation_parts(outlook, member, largest, gpu),
        )

    def run(self, context: Context, folder: str) -> DistillOutput:
        recipe = context.recipe
        inputs = distill_inputs(context)
        source = pruning_source(context)
        training = recipe.distillation(context.member)
        losses, losses_chosen = _losses(context)
        context.console.say(f"  losses: {losses_chosen}")
        architecture = context.output(Search).winner
        pruned = storage.join(folder, "pruned")
        student = storage.join(folder, "student")
        curve = storage.join(folder, "curve.json")
        checkpoints = storage.join(folder, "checkpoints")
        if not storage.is_committed(student):
            context.workers.ahead()
        if not storage.is_committed(pruned):
            pruning = _Pruning(source, architecture, pruned)
            # iterative pruning measures the model again before each step, in all processes together
            context.workers.compute(_prune, pruning, everywhere=source.recalibration is not None)
        channels = None
        if losses.needs_live_teacher and source.folder == inputs.teacher:
            # of a student that is pruned from another student, it is not known which of the teacher's channels it kept
            channels = source.channels(context.output(Teacher).architecture, architecture)
        if not storage.is_committed(student):
            from minitron_platform.training.train import TrainTask, train

            resources = context.ensure_ray()
            teacher = context.output(Teacher)
            on_gpus = distillation_on_gpus(
                recipe,
                context.member,
                teacher.architecture,
                architecture,
                DTYPES[teacher.dtype].itemsize,
                resources,
                losses,
            )
            config, teacher_kept = training_settings(context, "distill", training, on_gpus)
            view = training_view(context, "distill", folder, training.steps)
            context.console.status(view.text)
            task = TrainTask(
                materials=inputs,
                config=config,
                losses=losses,
                checkpoints=checkpoints,
                curve=curve,
                result=student,
                key=folder.rsplit("/", 1)[-1],
                student=pruned,
                channels=channels,
                online=recipe.targets.mode == "online",
                teacher=TEACHER.get(teacher_kept, recipe.targets.teacher),
                tasks_every=training.evaluate_tasks_every,
                tasks=training_tasks(recipe.evaluate),
                tasks_batch_rows=recipe.evaluate.batch_rows,
                add_bos=recipe.data.bos,
            )
            context.workers.train(train, task, view.event)
            context.console.status("")
        context.check_fences()
        if not storage.exists(curve):  # an earlier version wrote it after the student, and was killed in between
            write_curve(checkpoints, curve)
        storage.remove(checkpoints)
        tokens = training.steps * training.batch_rows * context.output(Data).seq_length
        return DistillOutput(
            pruned=pruned,
            student=student,
            curve=curve,
            id=storage.fingerprint(weight_hashes(student)),
            tokens=tokens,
            parameters=architecture.num_parameters,
            architecture=architecture,
            losses=asdict(losses),
            losses_chosen=losses_chosen,
            summary=f"{tokens:,} tokens · {architecture.num_parameters / 1e6:.1f}M parameters",
        )

    def record(self, context: Context, output: DistillOutput) -> None:
        """Add to the run's record the steps of the training curve that it lacks."""
        training = context.recipe.distillation(context.member)
        step_tokens = training.batch_rows * context.output(Data).seq_length
        complete_record(context.log(self.name), output.curve, step_tokens)


def _losses(state: RunState) -> tuple[Losses, str]:
    """The losses for the winner of the search, and a sentence on why."""
    return distillation_losses(state.recipe, state.output(Search).winner, state.output(Teacher).architecture)


@dataclass(frozen=True)
class _Pruning:
    source: PruningSource
    architecture: Architecture
    target: str
    """Folder that the pruned checkpoint is committed to."""


def _prune(task: _Pruning, worker: Worker) -> None:
    """Prune the model and commit it, tensor by tensor, unless a worker has that died later. All processes run the steps of
    iterative pruning."""
    if largest([storage.is_committed(task.target)], worker.count > 1) == [1]:
        return
    worker.progress.status("pruning")
    if worker.is_first:
        task.source.write_student(task.architecture, task.target, before_commit=worker.before_commit)
    else:
        task.source.prune(task.source.load(), task.architecture)
