"""One candidate: its score before training, and its short distillation from pruning to its held-out KL."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from numbers import Integral
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from minitron import storage
from minitron.architecture import Architecture
from minitron.distill import DistillConfig, Losses, distill
from minitron.distill.checkpoints import committed_steps
from minitron.distill.inputs import DistillInputs
from minitron.logits import Head
from minitron.models import quiet_transformers
from minitron.pruning.source import PruningSource
from minitron_search.arguments import check_type
from minitron_search.events import Finished, Paused, Progress, Report, RungReached, Scored, Started, Undistilled
from minitron_search.trial_store import (
    ForwardScore,
    RungResult,
    TrialResult,
    checkpoints,
    drop_checkpoints,
    forward_score,
    rung_result,
    trial_key,
    trial_result,
    weights,
    write_forward_score,
    write_result,
    write_rung,
)

T = TypeVar("T")


@dataclass(frozen=True)
class SearchTask:
    """What every trial of a search shares.

    `folder` keeps each trial's checkpoints and results, under its own key. Candidates are cut from `origin`, distilled as
    `config` and `losses` say, and compared on the first `heldout_rows` held-out rows, by default all, also after the steps
    `rungs` (ascending). `threads` are a trial's on a CPU. With `keep_weights` the distilled students are kept (see
    `minitron_search.trial_store.weights`). Raises InputError for a field of the wrong type.
    """

    materials: DistillInputs
    origin: PruningSource
    config: DistillConfig
    losses: Losses
    folder: str
    heldout_rows: int | None = None
    threads: int = 1
    rungs: tuple[int, ...] = ()
    keep_weights: bool = False

    def __post_init__(self) -> None:
        check_type("materials", self.materials, DistillInputs)
        check_type("origin", self.origin, PruningSource)
        check_type("config", self.config, DistillConfig)
        check_type("losses", self.losses, Losses)
        check_type("folder", self.folder, str)
        check_type("threads", self.threads, Integral)
        if self.heldout_rows is not None:
            check_type("heldout_rows", self.heldout_rows, Integral)
        check_type("rungs", self.rungs, tuple)
        for step in self.rungs:
            check_type("rungs", step, Integral)


def finished_result(task: SearchTask, architecture: Architecture) -> TrialResult | None:
    """The result of a finished trial that was measured at the task's rungs; None where it is to be done (again)."""
    return trial_result(task.folder, architecture, task.rungs)


def score(task: SearchTask, architecture: Architecture, report: Report) -> None:
    """Cut the candidate out and store its exact held-out KL without training it; `report` gets a `Scored`."""
    _use_threads(task)
    source, teacher_head = _source(task.materials, task.origin)
    found = _measured_before(task, architecture, lambda: task.origin.prune(source, architecture), teacher_head)
    report(Scored(os.getpid(), found.kl, found.loss))


def run_trial(task: SearchTask, architecture: Architecture, report: Report, *, until: int | None = None) -> None:
    """Prune, distil briefly, and measure on the held-out rows; the result is stored and never computed twice.

    If the task keeps weights and a finished trial's are gone, it is done again, to the same result.
    With `until` the trial pauses after that step, and a later call goes on from there. A trial that was killed resumes from
    its last checkpoint. `report` gets `Started`, `Undistilled`, a `Progress` for each step, `RungReached` at each rung, and
    `Paused` or `Finished`.
    """
    if not ready(task, architecture):
        return
    train(task, architecture, report, until=until)
    if until is None:
        drop_checkpoints(task.folder, architecture)


def ready(task: SearchTask, architecture: Architecture) -> bool:
    """Clear away what a trial cannot resume from; False if it has finished."""
    kept = not task.keep_weights or storage.is_committed(weights(task.folder, architecture))
    if kept and finished_result(task, architecture) is not None:
        drop_checkpoints(task.folder, architecture)  # killed just before it could
        return False
    _start_over_if_rungs_were_passed(task, architecture)
    return True


def train(task: SearchTask, architecture: Architecture, report: Report, *, until: int | None = None) -> None:
    """The trial itself, in one process or, with torch.distributed, in each of several together: all of them measure, because
    a sharded student takes all of them to run, and the first one writes."""
    _use_threads(task)
    started = time.perf_counter()
    materials, steps = task.materials, task.config.steps
    report(Started(os.getpid()))
    student, teacher_head = materials.student(task.origin, architecture)
    before = _measured_before(task, architecture, lambda: student, teacher_head)
    report(Undistilled(before.kl, before.loss))

    def measure(done: int, model: nn.Module) -> None:
        # before the checkpoint of this step is written, so that a trial that resumes from one never skips a rung
        rung = _measured_at(task, architecture, done, model, teacher_head)
        report(RungReached(done, rung.kl, rung.loss))

    distill(
        student,
        materials.targets(teacher_head),
        materials.open_rows("train"),
        task.config,
        losses=task.losses,
        checkpoints=checkpoints(task.folder, architecture),
        key=trial_key(architecture),
        report=lambda step: report(Progress(step.step, step.metrics())),
        evaluate=measure,
        evaluate_at=task.rungs,
        until=until,
    )
    if until is not None:
        report(Paused(until))
        return
    after = materials.heldout(student, teacher_head, task.heldout_rows)
    assert after.kl is not None
    assert after.top1_agreement is not None
    assert after.per_row_kl is not None
    rungs = [rung for step in task.rungs if (rung := rung_result(task.folder, architecture, step)) is not None]
    result = TrialResult(
        architecture=architecture,
        parameters=architecture.num_parameters,
        kl_undistilled=before.kl,
        loss_undistilled=before.loss,
        rung_kl={rung.step: rung.kl for rung in rungs},
        kl=after.kl,
        loss=after.loss,
        top1_agreement=after.top1_agreement,
        per_row_kl=tuple(after.per_row_kl),
        tokens=steps * task.config.batch_rows * materials.open_rows("train").seq_length,
        config=asdict(task.config),
        seconds=time.perf_counter() - started,
    )
    if _is_first():
        if task.keep_weights:
            _save_weights(student, weights(task.folder, architecture))
        write_result(task.folder, result)
    report(Finished(steps, after.kl, after.loss))


def _start_over_if_rungs_were_passed(task: SearchTask, architecture: Architecture) -> None:
    """A checkpoint beyond a rung that was not in the task when it was written can't be resumed from."""
    missing = [step for step in task.rungs if rung_result(task.folder, architecture, step) is None]
    saved = committed_steps(checkpoints(task.folder, architecture))
    if missing and saved and saved[-1] >= missing[0]:
        drop_checkpoints(task.folder, architecture)


def _save_weights(student: nn.Module, target: str) -> None:
    if not storage.is_committed(target):
        with storage.committed_folder(target) as folder, quiet_transformers():
            student.save_pretrained(str(folder))  # type: ignore[operator]


@lru_cache(maxsize=1)
def _source(materials: DistillInputs, origin: PruningSource) -> tuple[nn.Module, Head]:
    """Kept in a worker from one candidate to the next."""
    return materials.source(origin)


def _use_threads(task: SearchTask) -> None:
    if not torch.cuda.is_available():
        torch.set_num_threads(task.threads)


def _measured_before(
    task: SearchTask, architecture: Architecture, student: Callable[[], nn.Module], teacher_head: Head
) -> ForwardScore:
    known = _agreed(forward_score(task.folder, architecture))
    if known is not None:
        return known
    metrics = task.materials.heldout(student(), teacher_head, task.heldout_rows)
    assert metrics.kl is not None
    measured = ForwardScore(metrics.kl, metrics.loss)
    if _is_first():
        write_forward_score(task.folder, architecture, measured)
    return measured


def _measured_at(
    task: SearchTask, architecture: Architecture, step: int, student: nn.Module, teacher_head: Head
) -> RungResult:
    known = _agreed(rung_result(task.folder, architecture, step))
    if known is not None:
        return known
    metrics = task.materials.heldout(student, teacher_head, task.heldout_rows)
    assert metrics.kl is not None
    assert metrics.per_row_kl is not None
    measured = RungResult(step, metrics.kl, metrics.loss, tuple(metrics.per_row_kl))
    if _is_first():
        write_rung(task.folder, architecture, measured)
    return measured


def _agreed(known: T | None) -> T | None:
    """What the first process has read, in every process, so that all of them measure or none does."""
    if not dist.is_initialized():
        return known
    box = [known]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _is_first() -> bool:
    """Whether this process writes for those that train together."""
    return not dist.is_initialized() or dist.get_rank() == 0
