"""Distillation on one process or many. A step is a pure function of weights, optimizer state and the step's number, so an
interrupted run continues as if nothing had happened."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from minitron import storage
from minitron.arguments import check_model, check_type, short_repr
from minitron.data import DocumentBoundaries, Rows, rows_for_step
from minitron.distill import cuda_graphs
from minitron.distill.checkpoints import Checkpoints
from minitron.distill.config import DistillConfig
from minitron.distill.curve import Curve, Point
from minitron.distill.feeder import Feeder, MicroBatch
from minitron.distill.losses import Losses
from minitron.distill.losses.objective import Objective
from minitron.distill.preparation import preparation
from minitron.distill.report import Reporter, StepReport
from minitron.distill.schedule import learning_rate
from minitron.distill.sharding import begin_micro_batch, gathered
from minitron.distill.state import TrainingState
from minitron.distill.teacher.live import LiveTeacher, Targets
from minitron.errors import InputError, NonFiniteError
from minitron.evaluation.mode import undisturbed
from minitron.meta_models import Weights

log = logging.getLogger(__name__)


def distill(
    student: nn.Module,
    targets: Targets | None,
    rows: Rows,
    config: DistillConfig,
    *,
    losses: Losses = Losses(),  # noqa: B008 (frozen)
    channels: Tensor | None = None,
    documents: DocumentBoundaries | None = None,
    checkpoints: str | None = None,
    key: str = "",
    before_commit: Callable[[], None] | None = None,
    saved: Callable[[int], None] | None = None,
    save_now: Callable[[], bool] | None = None,
    resumed: Callable[[int], None] | None = None,
    report: Callable[[StepReport], None] | None = None,
    evaluate: Callable[[int, nn.Module], None] | None = None,
    evaluate_at: Collection[int] = (),
    until: int | None = None,
    weights: Weights | None = None,
) -> nn.Module:
    """Train `student` in place to match the teacher on `rows`, by default its next-token distribution by forward KL alone.

    Only parameters that require a gradient are trained. The student's weights keep their dtype; master weights, AdamW's
    moments and the accumulated gradients are float32. There is no dropout. If torch.distributed is initialised, every process
    takes its share of each global batch and the gradients are summed.

    channels: int64 [hidden_size], the teacher's channels that the student kept; the intermediate losses start from them.
    documents: for example `rows.boundaries`: the student does not attend from one document of a row to another. The teacher
        of `targets` must do the same.
    checkpoints: folder where the state is saved every `checkpoint_every` steps. The newest undamaged checkpoint under `key` is
        resumed. The training curve is kept with them (see `read_curve`).
    before_commit: called in process 0 before anything in `checkpoints` is changed; it may raise a MinitronError to prevent
        that. Other processes may then wait for process 0, and must be ended.
    saved: called in process 0, in another thread, with the step of each checkpoint that was committed.
    save_now: asked in every process after each step; once one process says so, for example because its node is about to be
        taken away, all save a checkpoint and wait until it is committed.
    resumed: called with the number of steps done before, 0 for a new training.
    evaluate: called in every process with the number of steps done and the student, every `evaluate_every` steps and after the
        steps in `evaluate_at`, before that step's checkpoint. The random state is restored afterwards.
    until: stop after this step of the same schedule and save it, so that a later call continues from there.
    weights: where a `student` on the meta device (see `minitron.meta_models.open_model`) is read from, onto the GPU or, without
        one, into main memory. With `config.shard` and several processes, each process reads its own rows only. The returned
        student is then still sharded: its parameters are float32 DTensors, which `minitron.meta_models.write_model` saves. A
        student that was given in memory is whole again in every process.

    Raises InputError if `losses` need more than `targets` have, a live teacher separates other documents, or FP8 is not
    possible (see `minitron.distill.fp8.check_fp8`). Raises NonFiniteError, which names the step and its rows, if the loss or
    the gradient is not finite in more than `max_skipped_steps` steps. Such steps update nothing and are not reported; they are
    logged, and written to `checkpoints` as `nonfinite-STEP.json`.
    """
    _check_arguments(student, targets, rows, config, losses, documents, until, checkpoints)
    before_commit = before_commit or (lambda: None)
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    with ExitStack() as stack:
        prepared = stack.enter_context(
            preparation(student, targets, rows.seq_length, config, losses, channels, documents, weights)
        )
        objective, device = prepared.objective, prepared.device
        working, watch = objective.student, objective.watch
        feeder = stack.enter_context(Feeder(rows, objective.targets, device))
        alike = prepared.sharded or (isinstance(objective.targets, LiveTeacher) and objective.targets.sharded)
        batches_of = partial(_micro_batches, len(rows), config, world=world, rank=rank, alike=alike)
        state = stack.enter_context(TrainingState(objective.trained(), config))
        total = torch.zeros(5, dtype=torch.float64, device=device)
        run: cuda_graphs.Run = partial(_micro_batch, objective, total)
        if config.cuda_graphs and cuda_graphs.available(device):
            cuda_graphs.check_recordable(objective, feeder)
            state.keep_sums()
            run = stack.enter_context(cuda_graphs.CudaGraphs(run, watch))
        saver = (
            stack.enter_context(Checkpoints(checkpoints, key=key, before_commit=before_commit, saved=saved))
            if checkpoints
            else None
        )
        first, skipped = _resume(state, saver) if saver else (0, 0)
        curve = Curve(checkpoints) if checkpoints and rank == 0 else None
        if curve:
            before_commit()
            curve.resume(first)
        if resumed:
            resumed(first)
        last = config.steps if until is None else min(until, config.steps)
        reporter = Reporter(objective, config, rows.seq_length, prepared.dtype, first) if report else None
        hurried = False  # whether a checkpoint was saved because of `save_now`
        for step in range(first, last):
            batches, following = batches_of(step), batches_of(step + 1)
            feeder.expect([row for part, _ in (*batches, *following) for row in part])
            total.zero_()
            _forward_backward(objective, feeder, run, batches, following[0][0] if following else None)
            if save_now and save_now():
                total[-1] = 1.0
            (*parts, requests), norm = state.reduce(total)
            hurry = bool(requests) and not hurried
            finite = math.isfinite(parts[0]) and math.isfinite(norm)
            rate = _learning_rate(step, config)
            if finite:
                state.update(rate)
            else:
                skipped += 1
                indices = rows_for_step(len(rows), config.batch_rows, step, config.seed)
                record = {"step": step, "rows": indices, "loss": parts[0], "grad_norm": norm}
                if curve:
                    before_commit()
                _not_finite(record, skipped, config, checkpoints if rank == 0 else None)
            state.clear()
            watch.lap("optimizer")
            done = step + 1
            at_interval = config.evaluate_every and done % config.evaluate_every == 0
            if evaluate and (at_interval or done in evaluate_at):
                with gathered(objective), undisturbed(working):
                    evaluate(done, working)
                watch.lap("evaluation")
            due = finite and (done % config.report_every == 0 or done == config.steps)
            if due and curve:
                curve.add(Point(done, parts[0], None if losses.logits == "none" else parts[1]))
            if due and report and reporter:
                report(reporter.report(done, parts, rate, norm, skipped))
                watch.lap("report")
            regular = config.checkpoint_every and done % config.checkpoint_every == 0 and done < config.steps
            if curve and (regular or hurry or done == last):
                before_commit()
                curve.save(done)
            # The last step of a sharded student is saved too: if gathering fails, the training is not repeated.
            before_gathering = config.checkpoint_every and prepared.sharded and done == config.steps
            if saver and (regular or before_gathering or hurry or done == until):
                saver.save(done, state.tensors(), {"skipped": skipped})
                if hurry:
                    saver.wait()
                    hurried = True
                watch.lap("checkpoint")
            if not report:
                watch.restart()  # nobody reads the times, which would add up
        del state  # the moments are not needed while a sharded student is gathered
    return student.eval()


def _check_arguments(
    student: nn.Module,
    targets: Targets | None,
    rows: Rows,
    config: DistillConfig,
    losses: Losses,
    documents: DocumentBoundaries | None,
    until: int | None,
    checkpoints: str | None,
) -> None:
    check_model("student", student)
    if not hasattr(rows, "take") or not hasattr(rows, "seq_length"):  # a tensor, or the folder's path
        check_type("rows", rows, Rows, "Rows, as Rows.open(...) returns them")
    if targets is not None and not callable(getattr(targets, "batch", None)):
        raise InputError(
            f"targets: {short_repr(targets)} is not a teacher",
            "give LiveTeacher(model) for a loaded model, or a StoredTeacher or TopKTeacher",
        )
    if documents is not None:
        check_type("documents", documents, DocumentBoundaries)
    check_type("config", config, DistillConfig, "a DistillConfig")
    check_type("losses", losses, Losses, "Losses")
    if until is not None and not checkpoints:
        raise InputError(f"until: {until} without checkpoints", "say where the state at that step is to be saved")


def _micro_batches(
    num_rows: int, config: DistillConfig, step: int, *, world: int, rank: int, alike: bool
) -> list[tuple[Sequence[int], float]]:
    """The rows of each micro-batch of a process, and their share of the step's rows; none after the last step. With `alike`
    every process has the same number of micro-batches; a process that has too few repeats a row, with a share of 0."""
    if step >= config.steps:
        return []
    indices = rows_for_step(num_rows, config.batch_rows, step, config.seed)
    own, size = indices[rank::world], config.micro_batch_rows
    count = math.ceil((math.ceil(len(indices) / world) if alike else len(own)) / size)
    parts = [own[number * size : (number + 1) * size] for number in range(count)]
    return [(part or indices[:1], len(part) / len(indices)) for part in parts]


def _forward_backward(
    objective: Objective,
    feeder: Feeder,
    run: cuda_graphs.Run,
    batches: list[tuple[Sequence[int], float]],
    following: Sequence[int] | None,
) -> None:
    """Compute this process's micro-batches of a step. following: the rows of the next step's first one."""
    for number, (part, share) in enumerate(batches, start=1):
        last = number == len(batches)
        if isinstance(objective, FSDPModule):
            begin_micro_batch(objective, last=last)
        batch = feeder.take(part, following if last else batches[number][0])
        # nearly all bytes that are read are the teacher's states
        objective.watch.lap("data" if batch.stored is None else "teacher")
        run(part, batch, torch.full((), share, dtype=torch.float64, device=feeder.device))
        objective.watch.lap("student")


def _micro_batch(objective: Objective, total: Tensor, indices: Sequence[int], batch: MicroBatch, share: Tensor) -> None:
    """Add the gradients of a micro-batch's share of the global mean loss to their sums, and that share of each part of the loss
    to `total`, float64 [5], whose last value is left alone."""
    loss, parts = objective(indices, *batch)
    (loss * share.to(loss.dtype)).backward()
    total[:-1] += parts * share


def _learning_rate(step: int, config: DistillConfig) -> float:
    return learning_rate(
        step,
        total_steps=config.steps,
        peak=config.peak_lr,
        minimum=config.min_lr,
        warmup_steps=config.warmup_steps,
        schedule=config.schedule,
        decay_share=config.decay_share,
    )


def _resume(state: TrainingState, saver: Checkpoints) -> tuple[int, int]:
    """Load the newest undamaged checkpoint. Returns the number of steps done and how many of them were skipped."""
    saved = saver.load(state.tensors())
    if saved is None:
        return 0, 0
    skipped = saved.get("skipped", 0)
    state.restored(saved["step"] - skipped)
    return saved["step"], skipped


def _not_finite(record: dict[str, Any], skipped: int, config: DistillConfig, folder: str | None) -> None:
    """Write down the step's rows. Raises NonFiniteError if more steps were skipped than `config` allows."""
    problem = "loss {loss} and gradient norm {grad_norm} at step {step}, rows {rows}".format(**record)
    if folder:
        storage.write_json(storage.join(folder, f"nonfinite-{record['step']:08d}.json"), record)
    if skipped > config.max_skipped_steps:
        raise NonFiniteError(problem, "lower the learning rate, or look at those rows of the data")
    log.warning("step skipped, %d of at most %d: %s", skipped, config.max_skipped_steps, problem)
