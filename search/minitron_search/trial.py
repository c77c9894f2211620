"""The trial of one candidate: its score before training, and its short distillation from pruning to the held-out KL."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from minitron import storage
from minitron.architecture import Architecture
from minitron.collectives import gather_json
from minitron.distill import distill
from minitron.distill.checkpoints import committed_steps
from minitron.evaluation import HeldoutMetrics
from minitron.logits import Head
from minitron_search.events import (
    Finished,
    Leaving,
    Paused,
    Progress,
    Report,
    RungReached,
    Scored,
    Started,
    Undistilled,
)
from minitron_search.leaving import NodeIsLeaving
from minitron_search.search_task import SearchTask
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
from minitron_search.trial_student import is_rank_zero, source, trial_student
from minitron_search.worker_imports import import_libraries

T = TypeVar("T", ForwardScore, RungResult)


def finished_result(task: SearchTask, architecture: Architecture) -> TrialResult | None:
    """The result of a finished trial that was measured at the task's rungs; None if the trial has to be run (again)."""
    return trial_result(task.folder, architecture, task.rungs)


def score(task: SearchTask, architecture: Architecture, report: Report) -> None:
    """Prune the candidate and store its exact held-out KL without training it; `report` gets a `Scored`."""
    import_libraries()
    _use_threads(task)
    origin, teacher_head = source(task.materials, task.origin)
    measured = _forward_score(task, architecture, lambda: task.origin.prune(origin, architecture), teacher_head)
    report(Scored(os.getpid(), measured.kl, measured.loss))


def run_trial(task: SearchTask, architecture: Architecture, report: Report, *, until: int | None = None) -> None:
    """Prune, distil briefly, and measure on the held-out rows; the result is stored and never computed twice.

    If the task keeps weights and those of a finished trial are missing, the trial is repeated, with the same result.
    With `until` the trial pauses after that step, and a later call resumes there. A trial that was killed resumes from its
    last checkpoint; one is saved at once when this process's node is about to be taken away. `report` gets `Started`,
    `Undistilled`, a `Progress` for each step, `RungReached` at each rung, `Leaving`, and `Paused` or `Finished`.
    """
    import_libraries()
    if not prepare(task, architecture):
        return
    train(task, architecture, report, NodeIsLeaving(), until=until)
    if until is None:
        task.before_commit()
        drop_checkpoints(task.folder, architecture)


def prepare(task: SearchTask, architecture: Architecture) -> bool:
    """Delete checkpoints that a trial cannot resume from; returns whether there is anything left to train."""
    has_weights = not task.keep_weights or storage.is_committed(weights(task.folder, architecture))
    if has_weights and finished_result(task, architecture) is not None:
        task.before_commit()
        drop_checkpoints(task.folder, architecture)  # left by a trial that was killed just before it deleted them
        return False
    _start_over_if_rungs_were_passed(task, architecture)
    return True


def train(
    task: SearchTask,
    architecture: Architecture,
    report: Report,
    is_leaving: Callable[[], bool],
    *,
    saved: Callable[[], object] = lambda: None,
    until: int | None = None,
) -> None:
    """Run the trial in this process or, with torch.distributed, in each of several processes together: all of them measure,
    each a part of the held-out rows, and rank 0 writes. is_leaving: whether the node of one of them is about to be taken away;
    then a checkpoint is saved at once. saved: called when a checkpoint has been committed."""
    _use_threads(task)
    started = time.perf_counter()
    materials = task.materials
    steps = task.config.steps
    report(Started(os.getpid()))
    student = trial_student(task, architecture)
    teacher_head = student.teacher_head
    before = _forward_score(task, architecture, student.untrained, teacher_head)
    report(Undistilled(before.kl, before.loss))

    def measure(step: int, model: nn.Module) -> None:
        # called before this step's checkpoint is written, so that a trial that resumes from a checkpoint never skips a rung
        rung = _rung_result(task, architecture, step, model, teacher_head)
        report(RungReached(step, rung.kl, rung.loss))

    def on_saved(step: int) -> None:
        saved()
        if is_leaving():
            report(Leaving(step))

    distill(
        student.model,
        materials.targets(teacher_head),
        materials.open_rows("train"),
        task.config,
        losses=task.losses,
        documents=materials.documents(),
        checkpoints=checkpoints(task.folder, architecture),
        key=trial_key(architecture),
        before_commit=task.before_commit,
        saved=on_saved,
        save_now=is_leaving,
        report=lambda step: report(Progress(step.step, step.metrics())),
        evaluate=measure,
        evaluate_at=task.rungs,
        until=until,
        weights=student.weights,
    )
    if until is not None:
        report(Paused(until))
        return
    after = _measured(task, student.trained(), teacher_head)
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
    if is_rank_zero():
        task.before_commit()
        write_result(task.folder, result)
    student.finish()
    report(Finished(steps, after.kl, after.loss))


def _start_over_if_rungs_were_passed(task: SearchTask, architecture: Architecture) -> None:
    """Delete checkpoints that are past a rung of the task that was not measured, as when the rung was added later."""
    missing = [step for step in task.rungs if rung_result(task.folder, architecture, step) is None]
    saved = committed_steps(checkpoints(task.folder, architecture))
    if missing and saved and saved[-1] >= missing[0]:
        task.before_commit()
        drop_checkpoints(task.folder, architecture)


def _use_threads(task: SearchTask) -> None:
    if not torch.cuda.is_available():
        torch.set_num_threads(task.threads)


def _forward_score(
    task: SearchTask, architecture: Architecture, student: Callable[[], nn.Module], teacher_head: Head
) -> ForwardScore:
    """The stored score before training, or a new one of `student()`."""
    stored = _from_rank_zero(forward_score(task.folder, architecture), ForwardScore)
    if stored is not None:
        return stored
    metrics = _measured(task, student(), teacher_head)
    assert metrics.kl is not None
    measured = ForwardScore(metrics.kl, metrics.loss)
    if is_rank_zero():
        task.before_commit()
        write_forward_score(task.folder, architecture, measured)
    return measured


def _rung_result(
    task: SearchTask, architecture: Architecture, step: int, student: nn.Module, teacher_head: Head
) -> RungResult:
    """The stored measurement after `step` steps, or a new one of `student`."""
    stored = _from_rank_zero(rung_result(task.folder, architecture, step), RungResult)
    if stored is not None:
        return stored
    metrics = _measured(task, student, teacher_head)
    assert metrics.kl is not None
    assert metrics.per_row_kl is not None
    measured = RungResult(step, metrics.kl, metrics.loss, tuple(metrics.per_row_kl))
    if is_rank_zero():
        task.before_commit()
        write_rung(task.folder, architecture, measured)
    return measured


def _measured(task: SearchTask, student: nn.Module, teacher_head: Head) -> HeldoutMetrics:
    """The metrics of `student` on the held-out rows of the search, of which each process of the trial measures a part."""
    return task.materials.heldout(student, teacher_head, task.heldout_rows, together=dist.is_initialized())


def _from_rank_zero(stored: T | None, kind: type[T]) -> T | None:
    """What rank 0 has read, in every process, so that either all of them measure or none does."""
    if not dist.is_initialized():
        return stored
    values = gather_json(stored.to_dict() if stored is not None and is_rank_zero() else None)[0]
    return None if values is None else kind.from_dict(values)
