"""A training on Ray Train, a student's distillation or the teacher's correction, by any number of workers.

The batch is a global one, so the number of workers changes the result only by rounding.
"""

from __future__ import annotations

import logging
import signal
import socket
import threading
import uuid
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ray.exceptions import RayError
from torch import Tensor, nn

from minitron import storage
from minitron.checkpoints.files import Checkpoint
from minitron.device import DTYPES, device
from minitron.distill import DistillConfig, LiveTeacher, Losses, distill
from minitron.distill.inputs import DistillInputs
from minitron.distill.teacher.live import Targets
from minitron.distill.trainable import trainable
from minitron.errors import MinitronError, NonFiniteError, StorageError, one_line
from minitron.evaluation import Task, heldout_metrics
from minitron.logits import Head
from minitron.meta_models import open_model, write_model
from minitron.models import load_model, load_tokenizer, save_model, save_tokenizer
from minitron_platform.fence import Fence, LeaseLostError
from minitron_platform.recipes.resources import ResolvedResources
from minitron_platform.training.curves import write_curve
from minitron_platform.training.events import Event, Measured, OnEvent, Resumed, Tagged, WorkersFailed, WorkerStarted
from minitron_search.failures import first_cause, reason


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
    threads: int
    """CPU threads of a worker."""
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
    tasks_batch_rows: int = 8
    add_bos: bool | None = None
    """Whether requests of `tasks` begin with a BOS token; None follows the tokenizer."""
    method: str = "full"
    """The parameters to train, see `minitron.distill.trainable`."""
    lora_rank: int = 16
    until: int | None = None
    """Step after which to stop and commit `result`; the training can be continued later with another `result`."""
    fences: tuple[Fence, ...] = ()
    """Leases of the driver; nothing is committed once another driver has taken one of them over."""

    def check_fences(self) -> None:
        """Raise LeaseLostError if another driver has taken the work over."""
        for fence in self.fences:
            fence.check()


def train_on_ray(task: TrainTask, resources: ResolvedResources, on_event: OnEvent, scratch: str) -> None:
    """Train with `resources.workers` processes; the model is committed when this returns.

    When a worker dies, all are restarted from the last checkpoint, up to `max_failures` times.

    on_event: called in a thread of this process with every event of the workers. scratch: folder for Ray Train's own files,
    which is deleted.

    Raises NonFiniteError if the loss is not finite, LeaseLostError if another driver has taken over, StorageError if a
    checkpoint cannot be written, and MinitronError if workers failed too often.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError

    from minitron_search.torch_trainer import TorchTrainer

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    events = _queue()
    listener = threading.Thread(target=_listen, args=(events, on_event), daemon=True)
    listener.start()
    # A new name each time, so that Ray Train does not resume from a snapshot of its own instead of the verified checkpoints.
    trainer = TorchTrainer(
        _worker,
        # By reference: Ray Train's controller reads this too, and would import the training's code before it starts a worker.
        train_loop_config={"task": ray.put(task), "events": events},
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=resources.worker_share,
        ),
        run_config=RunConfig(
            name=f"train-{uuid.uuid4().hex[:8]}",
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=resources.max_failures),
            callbacks=[_failures(events)],
        ),
    )
    storage.remove(scratch)  # of a run that was killed
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        raise _cause(getattr(error, "worker_failures", {0: error})) from error
    except SystemExit as error:
        raise KeyboardInterrupt from error  # Ray Train raises it on Ctrl-C
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)  # Ray Train leaves its own handler behind
        with suppress(RayError):  # if Ray is gone, there are no more events
            events.put(None)
        listener.join()
        events.shutdown(force=True)
        with suppress(OSError, StorageError):  # Ray Train may still write there; the next run removes the rest
            storage.remove(scratch)
    if result.return_value:
        raise result.return_value


def _cause(failures: dict[int, Exception]) -> MinitronError:
    """The error of the workers that failed first, for the user."""
    ranks, cause = first_cause(failures)
    if isinstance(cause, MinitronError):
        return cause
    return MinitronError(
        f"the training failed too often, the last time in worker {', '.join(map(str, ranks))}: {reason(cause)}",
        "run again to continue from the last checkpoint; resources.max_failures is the number of failures allowed",
    )


def _queue() -> Any:
    """A queue on this node for events from the workers and Ray Train's controller.

    `ray.train.report` is not used, because it is a barrier that waits for the controller's next poll, about two seconds per
    step.
    """
    import ray
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})


def _listen(events: Any, on_event: OnEvent) -> None:
    with suppress(RayError):  # Ray was shut down
        for event in iter(events.get, None):
            on_event(event)


def _failures(events: Any) -> Any:
    """A callback that reports failed workers; Ray Train calls it in the controller's process."""
    from ray.train import UserCallback

    class Failures(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            ranks, cause = first_cause(worker_exceptions)
            with suppress(RayError):
                events.put(WorkersFailed(tuple(ranks), reason(cause)))

    return Failures()


def _worker(config: dict[str, Any]) -> MinitronError | None:
    """One process of the training. Returns, instead of raising it, an error that every process has and that a restart would
    not fix: the loss is not finite, or another driver has taken over."""
    import ray

    task: TrainTask = ray.get(config["task"])
    with suppress(RayError):
        node = f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"
        config["events"].put(WorkerStarted(dist.get_rank(), node))
    if not torch.cuda.is_available():
        torch.set_num_threads(task.threads)
    model, weights, targets, head = _start(task)
    rows = task.materials.open_rows("train")
    every = task.tasks_every
    task_steps = range(every, task.config.steps + 1, every) if every else ()
    is_first = dist.get_rank() == 0  # the process that sends events and writes the result
    unconfirmed = list[Any]()  # events that may not have arrived yet
    failed_benchmarks: set[str] = set()  # those that were reported; each is reported once

    def wait_for_events() -> None:
        with suppress(RayError):  # lost events do not stop the training
            ray.get(unconfirmed)
        unconfirmed.clear()

    def send(event: Event) -> None:
        if is_first:
            wait_for_events()  # so that at most one event is lost if a process dies
            unconfirmed.append(config["events"].actor.put.remote(event))

    def send_metrics(metrics: dict[str, float], step: int) -> None:
        send(Measured(metrics, step))

    def on_benchmark_failure(name: str, error: Exception) -> None:
        if name not in failed_benchmarks:
            send(Tagged({f"minitron.failed.{name}": one_line(error)}))
        failed_benchmarks.add(name)

    def evaluate(step: int, student: nn.Module) -> None:
        tokens = {"tokens": step * task.config.batch_rows * rows.seq_length}
        # every process does the same: a sharded student needs all of them, and one that waited too long would be restarted
        if task.config.evaluate_every and step % task.config.evaluate_every == 0:
            send_metrics(_heldout_metrics(task, student, head) | tokens, step)
        if step in task_steps:
            send_metrics(task_metrics(task, student, on_benchmark_failure) | tokens, step)

    if isinstance(targets, LiveTeacher):
        send_metrics({"teacher_shards": dist.get_world_size() if targets.sharded else 1}, 0)

    try:
        with trainable(model, task.method, lora_rank=task.lora_rank):
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
                before_commit=task.check_fences,
                resumed=lambda step: send(Resumed(step)),
                report=lambda report: send_metrics(report.metrics(), report.step),
                evaluate=evaluate,
                evaluate_at=task_steps,
                until=task.until,
                weights=weights,
            )
    except (NonFiniteError, LeaseLostError) as error:
        return error
    wait_for_events()
    lost = None
    if is_first:
        try:
            task.check_fences()
            write_curve(task.checkpoints, task.curve)
        except LeaseLostError as error:
            lost = error
    outcome = [lost]
    dist.broadcast_object_list(outcome)
    if outcome[0] is None:
        with storage.committed_folder(task.result) if is_first else nullcontext() as folder:
            _save(task, model, weights, folder)
    dist.barrier()
    return outcome[0]


def _start(task: TrainTask) -> tuple[nn.Module, Checkpoint | None, Targets | None, Head | None]:
    """The model to train, the checkpoint that it is still to be read from (None if it is in memory), the teacher's outputs
    (None if no loss needs them) and the teacher's head (None if the teacher itself is trained)."""
    inputs = task.materials
    folder = storage.fetch(task.student or inputs.teacher)
    weights: Checkpoint | None = None
    sharded = task.config.shard and dist.get_world_size() > 1
    if task.method != "lora" and (sharded or device().type == "cuda"):  # so that no worker has a copy in main memory
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
    tokenizer = load_tokenizer(storage.fetch(task.materials.teacher))
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


def task_metrics(task: TrainTask, model: nn.Module, failed: Callable[[str, Exception], None]) -> dict[str, float]:
    """Scores of a model in training on the benchmarks, by "task_NAME.METRIC". Every process of the training must call this.

    failed: called with the name and the error of each benchmark that fails.
    """
    from minitron.evaluation import evaluate

    tokenizer = load_tokenizer(storage.fetch(task.materials.teacher))
    scores = evaluate(
        model,
        tokenizer,
        task.tasks,
        batch_size=task.tasks_batch_rows,
        add_bos=task.add_bos,
        on_failure=failed,
        together=True,
    )
    return {f"task_{name}.{score.metric}": score.value for name, score in scores.items()}
