"""A training by any number of workers: a student's distillation or the teacher's correction.

The batch is a global one, so the number of workers changes the result only by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn

from minitron import storage
from minitron.checkpoints.files import Checkpoint
from minitron.device import DTYPES, device
from minitron.distill import DistillConfig, LiveTeacher, Losses, distill
from minitron.distill.inputs import DistillInputs
from minitron.distill.teacher.live import Targets
from minitron.distill.trainable import trainable
from minitron.errors import MinitronError, NonFiniteError, one_line
from minitron.evaluation import Evaluated, Task, heldout_metrics
from minitron.evaluation.batches import BatchRows
from minitron.evaluation.watch import Change, TaskWatch
from minitron.logits import Head
from minitron.meta_models import open_model, write_model
from minitron.models import load_model, load_tokenizer, save_model, save_tokenizer
from minitron.processes import largest, wait_for_all
from minitron.tokenizer_beginning import with_beginning
from minitron_platform.training.curves import write_curve
from minitron_platform.training.events import Alarm, Measured, Resumed, Tagged
from minitron_platform.workers.worker import Worker

FIRST_SCORES = "first-scores.json"  # in the folder of the checkpoints


@dataclass(frozen=True)
class TrainTask:
    """Everything that a worker needs for a training."""

    materials: DistillInputs
    """Teacher, rows and stored targets."""
    config: DistillConfig
    losses: Losses
    checkpoints: str
    """Folder of the checkpoints."""
    curve: str
    """File of the training curve, written before the result."""
    result: str
    """Folder that the trained model is committed to."""
    key: str
    """Identity of the training; only checkpoints with the same key are resumed."""
    student: str | None = None
    """Folder of the model to train; without it the teacher itself is trained, on the next token alone."""
    channels: Tensor | None = field(default=None, repr=False)
    """Indices of the teacher's channels that the student kept, int64 [hidden_size of the student]; None if not known."""
    online: bool = False
    """Run the teacher on every batch instead of reading stored targets. Losses on intermediate states do so in any case."""
    teacher: str = "auto"
    """How a teacher that is run is loaded, as `targets.teacher` of a recipe."""
    tasks_every: int = 0
    """Steps between runs of `tasks`; 0 for never."""
    tasks: tuple[Task, ...] = ()
    tasks_batch_rows: BatchRows = 8
    add_bos: bool | None = None
    """Whether texts begin with a BOS token, in requests of `tasks` and by the saved tokenizer; None follows the teacher's."""
    method: str = "full"
    """The parameters to train, see `minitron.distill.trainable`."""
    lora_rank: int = 16
    until: int | None = None
    """Step after which to stop and commit `result`; the training can be continued later with another `result`."""


def train(task: TrainTask, worker: Worker) -> MinitronError | None:
    """Train in all workers together; the model is committed when this returns. A training that was interrupted continues from
    its last checkpoint; where a worker died after the model was committed, nothing is left to do.

    Sends `minitron_platform.training.events`. Returns, instead of raising it, an error that every process has and that a
    restart would not fix: the loss is not finite (NonFiniteError). Raises StorageError if a checkpoint cannot be written, and
    TakenOverError if another driver has taken over.
    """
    if largest([storage.is_committed(task.result)]) == [1]:
        return None
    model, weights, targets, head = _start(task)
    rows = task.materials.open_rows("train")
    every = task.tasks_every
    task_steps = range(every, task.config.steps + 1, every) if every else ()
    failed_benchmarks: set[str] = set()  # those that were reported; each is reported once
    unwatched: dict[
        str, None
    ] = {}  # benchmarks whose score has no standard error, so that a fall cannot be told from chance
    first = storage.join(task.checkpoints, FIRST_SCORES)
    watch = TaskWatch(len(task_steps), storage.read_json_if_exists(first) if every else None)

    def send_metrics(metrics: dict[str, float], step: int) -> None:
        worker.send(Measured(metrics, step))

    def on_benchmark_failure(name: str, error: Exception) -> None:
        if name not in failed_benchmarks:
            worker.send(Tagged({f"minitron.failed.{name}": one_line(error)}))
        failed_benchmarks.add(name)

    def evaluate(step: int, student: nn.Module) -> None:
        tokens = {"tokens": step * task.config.batch_rows * rows.seq_length}
        # every process does the same: a sharded student needs all of them, and one that waited too long would be restarted
        heldout = _heldout_metrics(task, student, head)  # with the tasks too, whose alarm needs the KL of the same step
        send_metrics(heldout | tokens, step)
        if step in task_steps:
            results = task_results(task, student, on_benchmark_failure)
            changes, falls = watch.add(step, results, heldout["heldout_kl"])
            if watch.first is not None and watch.first["step"] < step:
                unwatched.update(dict.fromkeys(name for name in results if name not in changes))
                worker.send(Tagged({"minitron.no_alarm": ", ".join(unwatched) or "none"}))
            if worker.is_first and watch.first is not None and watch.first["step"] == step:
                worker.before_commit()
                storage.write_json(first, watch.first)  # for a training that is resumed
            send_metrics(task_metrics(results, changes) | tokens, step)
            for fall in falls:
                worker.send(Alarm(fall.task, fall.text))

    def saved(step: int) -> None:
        worker.resumable()
        if worker.is_leaving():
            worker.progress.say(
                f"  a node is about to be taken away; step {step} is saved, from which the run can go on"
            )

    if isinstance(targets, LiveTeacher):
        send_metrics({"teacher_shards": dist.get_world_size() if targets.sharded else 1}, 0)

    try:
        with trainable(model, task.method, lora_rank=task.lora_rank, weights=weights) as source:
            distill(
                model,
                targets,
                rows,
                task.config,
                losses=task.losses,
                channels=task.channels,
                documents=task.materials.documents(),
                checkpoints=task.checkpoints,
                key=task.key,
                before_commit=worker.before_commit,
                saved=saved,
                save_now=worker.is_leaving,
                resumed=lambda step: worker.send(Resumed(step)),
                report=lambda report: send_metrics(report.metrics(), report.step),
                evaluate=evaluate,
                evaluate_at=task_steps,
                until=task.until,
                weights=source,
            )
    except NonFiniteError as error:
        return error
    if worker.is_first:
        worker.before_commit()
        write_curve(task.checkpoints, task.curve)
    commit = storage.committed_folder(task.result, before_commit=worker.before_commit)
    with commit if worker.is_first else nullcontext() as folder:
        _save(task, model, weights, folder)
    wait_for_all()
    return None


def _start(task: TrainTask) -> tuple[nn.Module, Checkpoint | None, Targets | None, Head | None]:
    """The model to train, the checkpoint that it is still to be read from (None if it is in memory), the teacher's outputs
    (None if no loss needs them) and the teacher's head (None if the teacher itself is trained)."""
    inputs = task.materials
    folder = storage.fetch(task.student or inputs.teacher)
    weights: Checkpoint | None = None
    sharded = task.config.shard and dist.get_world_size() > 1
    if sharded or device().type == "cuda":  # so that no worker has a copy in main memory
        student, weights = open_model(folder, DTYPES[inputs.dtype])
    else:
        student = load_model(folder, DTYPES[inputs.dtype]).to(device())
    if task.student is None:
        return student, weights, None, None
    if not task.losses.needs_teacher:
        return student, weights, None, inputs.teacher_head()
    if not (task.online or task.losses.needs_live_teacher):
        head = inputs.teacher_head()
        return student, weights, inputs.targets(head), head
    model, teacher_weights = inputs.open_teacher()
    documents, shard = inputs.documents(), task.teacher == "sharded"
    teacher = LiveTeacher(model, documents=documents, shard=shard, device=device(), weights=teacher_weights)
    return student, weights, teacher, teacher.head


def _save(task: TrainTask, model: nn.Module, weights: Checkpoint | None, folder: Path | None) -> None:
    """Save the trained model to `folder`, which only the first process has. A model that was read from `weights` is
    gathered one tensor at a time, by all processes together."""
    if weights is not None:
        write_model(model, weights, DTYPES[task.materials.dtype], folder)
    if folder is None:
        return
    tokenizer = with_beginning(load_tokenizer(storage.fetch(task.materials.teacher, weights=False)), task.add_bos)
    if weights is None:
        save_model(model, tokenizer, folder)
    else:
        save_tokenizer(tokenizer, folder)


def _heldout_metrics(task: TrainTask, model: nn.Module, head: Head | None) -> dict[str, float]:
    """Held-out metrics of a model in training, by the names "heldout_loss", "heldout_kl" and "heldout_top1_agreement"; the
    last two only if there is a teacher."""
    if head is None:
        rows = task.materials.open_rows("heldout")
        documents = task.materials.documents()
        metrics = heldout_metrics(model, rows.take(range(len(rows))), documents=documents, together=True)
    else:
        metrics = task.materials.heldout(model, head, together=True)
    return {f"heldout_{name}": value for name, value in vars(metrics).items() if isinstance(value, float)}


def task_results(task: TrainTask, model: nn.Module, failed: Callable[[str, Exception], None]) -> dict[str, Evaluated]:
    """Results of a model in training on the benchmarks, by name. Every process of the training must call this.

    failed: called with the name and the error of each benchmark that fails.
    """
    from minitron.evaluation import evaluate_documents

    tokenizer = load_tokenizer(storage.fetch(task.materials.teacher, weights=False))
    return evaluate_documents(
        model,
        tokenizer,
        task.tasks,
        batch_size=task.tasks_batch_rows,
        add_bos=task.add_bos,
        on_failure=failed,
        together=True,
    )


def task_metrics(results: Mapping[str, Evaluated], changes: Mapping[str, Change]) -> dict[str, float]:
    """All metrics by "task_NAME.METRIC", with their standard errors, changes since the first measurement and noise bands, and
    numbers of documents."""
    metrics: dict[str, float] = {}
    for name, result in results.items():
        key = f"task_{name}.{result.score.metric}"
        metrics |= result.numbers(f"task_{name}")
        metrics[f"task_{name}.documents"] = result.score.num_documents
        if name in changes:
            metrics |= {f"{key}_change": changes[name].value, f"{key}_band": changes[name].band}
    return metrics
