"""A full training on Ray Train, a student's distillation or the teacher's correction: any number of workers, one global
batch, one result."""

from __future__ import annotations

import logging
import signal
import socket
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from ray.exceptions import RayError
from torch import Tensor, nn

from minitron import storage
from minitron.device import DTYPES, device
from minitron.distill import DistillConfig, LiveTeacher, Losses, distill
from minitron.distill.inputs import DistillInputs
from minitron.distill.sharding import fits_beside
from minitron.distill.teacher.live import Targets
from minitron.distill.trainable import trainable
from minitron.errors import MinitronError, NonFiniteError, StorageError, one_line
from minitron.evaluation import Task, heldout_metrics
from minitron.logits import Head
from minitron.models import load_model, load_tokenizer, save_model
from minitron_platform.fence import Fence, LeaseLostError
from minitron_platform.recipes.resources import ResolvedResources
from minitron_platform.training.curves import write_curve
from minitron_platform.training.events import Event, Measured, OnEvent, Resumed, Tagged, WorkersFailed, WorkerStarted
from minitron_search.failures import first_cause, reason


@dataclass(frozen=True)
class TrainTask:
    """What every worker needs. `result` is the folder that the trained model is committed to, after `until` steps where that
    is given: training can go on from there with another `result`. The training curve so far is written to `curve` before.

    `student` is the folder of the model to train, and `channels` are the teacher's that it kept; without it the teacher
    itself is trained, on the next token alone. With `online` the teacher is run on every batch instead of read, as it is too
    where the losses compare more than logits: whole in every worker or split over them, as `teacher` in a recipe's `targets`
    says. Every `config.evaluate_every` steps the held-out rows are measured, every `tasks_every` the `tasks`, whose
    requests begin as `add_bos` says. Nothing is committed once one of `fences` was passed by another driver.
    """

    materials: DistillInputs
    config: DistillConfig
    losses: Losses
    checkpoints: str
    curve: str
    result: str
    key: str
    threads: int
    student: str | None = None
    channels: Tensor | None = field(default=None, repr=False)
    online: bool = False
    teacher: str = "auto"
    tasks_every: int = 0
    tasks: tuple[Task, ...] = ()
    tasks_batch_rows: int = 8
    add_bos: bool | None = None
    method: str = "full"
    lora_rank: int = 16
    until: int | None = None
    fences: tuple[Fence, ...] = ()

    def check_fences(self) -> None:
        for fence in self.fences:
            fence.check()


def train_on_ray(task: TrainTask, resources: ResolvedResources, on_event: OnEvent, scratch: str) -> None:
    """Train with `resources.workers` processes; the model is committed when this returns.

    When a worker dies all are restarted from the last checkpoint, up to `max_failures` times. `on_event` is called in a
    thread of this process with all that workers report and with what ended them.
    Raises NonFiniteError where the loss is not finite, LeaseLostError where another driver took over, StorageError where a
    checkpoint cannot be written, and MinitronError when workers died too often.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError

    from minitron_search.torch_trainer import TorchTrainer

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    events = _queue()
    listener = threading.Thread(target=_listen, args=(events, on_event), daemon=True)
    listener.start()
    # The name is new each time: what a run resumes from is its own verified checkpoints, not Ray Train's snapshot.
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
    storage.remove(scratch)  # a killed run's
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        raise _cause(getattr(error, "worker_failures", {0: error})) from error
    except SystemExit as error:
        raise KeyboardInterrupt from error  # what Ray Train makes of Ctrl-C
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)  # Ray Train leaves its own handler behind
        with suppress(RayError):  # with Ray gone there is nothing more to hear
            events.put(None)
        listener.join()
        events.shutdown(force=True)
        with suppress(OSError, StorageError):  # Ray Train may still be writing there; the next run removes the rest
            storage.remove(scratch)
    if result.return_value:
        raise result.return_value


def _cause(failures: dict[int, Exception]) -> MinitronError:
    """What went wrong in the workers, as an error for the user."""
    ranks, cause = first_cause(failures)
    if isinstance(cause, MinitronError):
        return cause
    return MinitronError(
        f"the training failed too often, the last time in worker {', '.join(map(str, ranks))}: {reason(cause)}",
        "run again to go on from the last checkpoint; resources.max_failures says how often workers may fail",
    )


def _queue() -> Any:
    """A queue on this node, from the workers and Ray Train's controller to this process.

    Not `ray.train.report`: that is a barrier that waits for the controller's next poll, about two seconds every step.
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
    """Tells of failed workers; Ray Train calls it in its controller's process."""
    from ray.train import UserCallback

    class Failures(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            ranks, cause = first_cause(worker_exceptions)
            with suppress(RayError):
                events.put(WorkersFailed(tuple(ranks), reason(cause)))

    return Failures()


def _worker(config: dict[str, Any]) -> MinitronError | None:
    """One process of the distillation; returns the error where every process sees it alike and no restart would help: the
    loss is not finite, or another driver took over."""
    import ray

    task: TrainTask = ray.get(config["task"])
    with suppress(RayError):
        node = f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"
        config["events"].put(WorkerStarted(dist.get_rank(), node))
    if not torch.cuda.is_available():
        torch.set_num_threads(task.threads)
    model, targets, head = _start(task)
    rows = task.materials.open_rows("train")
    every = task.tasks_every
    tasks_due = range(every, task.config.steps + 1, every) if every else ()
    first, underway = dist.get_rank() == 0, list[Any]()
    failed_benchmarks: set[str] = set()  # told of once each

    def heard() -> None:
        with suppress(RayError):  # what is told never stops the work
            ray.get(underway)
        underway.clear()

    def tell(event: Event) -> None:
        heard()  # so that at most one event is on its way when something dies
        underway.append(config["events"].actor.put.remote(event))

    def record(metrics: dict[str, float], step: int) -> None:
        if first:
            tell(Measured(metrics, step))

    def resumed(step: int) -> None:
        if first:
            tell(Resumed(step))

    def benchmark_failed(name: str, error: Exception) -> None:
        if name not in failed_benchmarks and first:
            tell(Tagged({f"minitron.failed.{name}": one_line(error)}))
        failed_benchmarks.add(name)

    def evaluate(done: int, student: nn.Module) -> None:
        tokens = {"tokens": done * task.config.batch_rows * rows.seq_length}
        # in every process alike: a sharded student is run by all, and none waits so long that it is given up
        if task.config.evaluate_every and done % task.config.evaluate_every == 0:
            record(_heldout(task, student, head) | tokens, done)
        if done in tasks_due:
            record(task_metrics(task, student, benchmark_failed) | tokens, done)

    if isinstance(targets, LiveTeacher):
        record({"teacher_shards": dist.get_world_size() if targets.sharded else 1}, 0)

    try:
        with trainable(model, task.method, lora_rank=task.lora_rank):
            distill(
                model,
                targets,
                rows,
                task.config,
                losses=task.losses,
                channels=task.channels,
                checkpoints=task.checkpoints,
                key=task.key,
                before_commit=task.check_fences,
                resumed=resumed,
                report=lambda step: record(step.metrics(), step.step),
                evaluate=evaluate,
                evaluate_at=tasks_due,
                until=task.until,
            )
    except (NonFiniteError, LeaseLostError) as error:
        return error
    heard()
    lost = None
    if first:
        try:
            task.check_fences()
            write_curve(task.checkpoints, task.curve)
            with storage.committed_folder(task.result) as folder:
                save_model(model, load_tokenizer(storage.fetch(task.materials.teacher)), folder)
        except LeaseLostError as error:
            lost = error
    dist.barrier()
    return lost


def _start(task: TrainTask) -> tuple[nn.Module, Targets | None, Head | None]:
    """The model to train, what it is compared with, and the teacher's head."""
    reads = task.materials
    if task.student is None:
        return reads.load_teacher(), None, None
    student = load_model(storage.fetch(task.student), DTYPES[reads.dtype]).to(device())
    if not task.losses.needs_teacher:
        return student, None, reads.teacher_head()
    if not (task.online or task.losses.needs_live_teacher):
        head = reads.teacher_head()
        return student, reads.targets(head), head
    model = reads.load_teacher(torch.device("cpu"))
    size = sum(parameter.nbytes for parameter in model.parameters())
    whole = {"replicated": True, "sharded": False}.get(task.teacher)
    if whole is None:
        whole = fits_beside(size, student, shard=task.config.shard)
    teacher = LiveTeacher(model, shard=not whole, device=device())
    return student, teacher, teacher.head


def _heldout(task: TrainTask, model: nn.Module, head: Head | None) -> dict[str, float]:
    """What the held-out rows say of a model in training."""
    if head is None:
        rows = task.materials.open_rows("heldout")
        metrics = heldout_metrics(model, rows.take(range(len(rows))))
    else:
        metrics = task.materials.heldout(model, head)
    values = {"loss": metrics.loss, "kl": metrics.kl, "top1_agreement": metrics.top1_agreement}
    return {f"heldout_{name}": value for name, value in values.items() if value is not None}


def task_metrics(task: TrainTask, model: nn.Module, failed: Callable[[str, Exception], None]) -> dict[str, float]:
    """The scores of a model in training on the benchmarks, by "task_NAME.METRIC"; `failed` is told of those that raise.
    Every process of the training calls this alike."""
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
