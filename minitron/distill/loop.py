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
from minitron.device import device
from minitron.distill import cuda_graphs
from minitron.distill.blocks import compiled_blocks, running_blocks
from minitron.distill.checkpoints import Checkpoints
from minitron.distill.config import DistillConfig
from minitron.distill.curve import Curve, Point
from minitron.distill.determinism import deterministic_kernels
from minitron.distill.feeder import Feeder, MicroBatch
from minitron.distill.fp8 import capability_of, check_fp8, fp8_linears
from minitron.distill.losses import Losses
from minitron.distill.losses.objective import Objective
from minitron.distill.report import Reporter, StepReport
from minitron.distill.schedule import learning_rate
from minitron.distill.sharding import begin_micro_batch, gathered, shard_, working_copy
from minitron.distill.state import TrainingState
from minitron.distill.teacher.live import LiveTeacher, Targets
from minitron.distill.timing import Stopwatch
from minitron.errors import InputError, NonFiniteError
from minitron.evaluation.mode import evaluating, undisturbed
from minitron.meta_models import InMemory, Weights, on_meta, read_
from minitron.models import head_of

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
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    before_commit = before_commit or (lambda: None)
    sharded = config.shard and world > 1
    compute_device = device() if on_meta(student) else next(student.parameters()).device
    dtype = head_of(student).dtype
    if config.fp8 != "none":
        check_fp8(dtype, rows.seq_length, capability_of(compute_device))
    watch = Stopwatch(compute_device)
    with ExitStack() as stack:
        if config.deterministic:
            stack.enter_context(deterministic_kernels(compute_device))
        working = student
        if sharded and weights is None:
            working, weights = stack.enter_context(working_copy(student)), InMemory(student)
        if weights is not None and not sharded:
            read_(working, weights, dtype, compute_device)
        # a step depends on weights and rows alone: no dropout, no noise on routers
        stack.enter_context(evaluating(working))
        objective = Objective(working, targets, losses, channels, watch, documents, weights if sharded else None)
        if objective.intermediate:
            objective.intermediate.to(compute_device)
        compared = objective.intermediate
        stack.enter_context(fp8_linears(working, config.fp8, compute_device, with_gradients=True))
        if isinstance(objective.targets, LiveTeacher):
            stack.enter_context(fp8_linears(objective.targets.model, config.fp8, compute_device, with_gradients=False))
        stack.enter_context(
            running_blocks(
                working,
                activation_checkpointing=config.activation_checkpointing,
                compiled=config.compile,
                recorded=compared.student_modules if compared else (),
            )
        )
        if config.compile and isinstance(objective.targets, LiveTeacher):
            recorded = compared.teacher_modules if compared else ()
            stack.enter_context(compiled_blocks(objective.targets.model, recorded=recorded))
        if world > 1:
            _start_alike(objective)
        if sharded:
            assert weights is not None
            shard_(objective, compute_device)
            read_(working, weights, dtype, compute_device)
        feeder = stack.enter_context(Feeder(rows, objective.targets, compute_device))
        alike = sharded or (isinstance(objective.targets, LiveTeacher) and objective.targets.sharded)
        state = stack.enter_context(TrainingState(objective.trained(), config))
        total = torch.zeros(5, dtype=torch.float64, device=compute_device)
        run: cuda_graphs.Run = partial(_micro_batch, objective, total)
        if config.cuda_graphs and cuda_graphs.available(compute_device):
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
        reporter = Reporter(objective, config, rows.seq_length, dtype, first) if report else None
        hurried = False  # whether a checkpoint was saved because of `save_now`
        for step in range(first, last):
            indices = rows_for_step(len(rows), config.batch_rows, step, config.seed)
            batches = _micro_batches(indices, config.micro_batch_rows, world, rank, alike=alike)
            following = []
            if step + 1 < config.steps:
                next_indices = rows_for_step(len(rows), config.batch_rows, step + 1, config.seed)
                following = _micro_batches(next_indices, config.micro_batch_rows, world, rank, alike=alike)
            feeder.expect([row for part, _ in (*batches, *following) for row in part])
            total.zero_()
            _forward_backward(objective, feeder, run, batches, following[0][0] if following else None)
            rate = learning_rate(
                step,
                total_steps=config.steps,
                peak=config.peak_lr,
                minimum=config.min_lr,
                warmup_steps=config.warmup_steps,
                schedule=config.schedule,
                decay_share=config.decay_share,
            )
            if save_now and save_now():
                total[-1] = 1.0
            (*parts, requests), norm = state.reduce(total)
            hurry = bool(requests) and not hurried
            finite = math.isfinite(parts[0]) and math.isfinite(norm)
            if finite:
                state.update(rate)
            else:
                skipped += 1
                found = {"step": step, "rows": indices, "loss": parts[0], "grad_norm": norm}
                if curve:
                    before_commit()
                _not_finite(found, skipped, config, checkpoints if rank == 0 else None)
            state.clear()
            watch.lap("optimizer")
            done = step + 1
            wanted = config.evaluate_every and done % config.evaluate_every == 0
            if evaluate and (wanted or done in evaluate_at):
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
            before_gathering = config.checkpoint_every and sharded and done == config.steps
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


def _start_alike(objective: Objective) -> None:
    """Broadcast the initial values of trained parameters from process 0. Projections and adapters are computed in each process
    and may differ in the last bits between machines. Weights on the meta device are read from the same file by all."""
    for _, parameter in objective.trained():
        if not parameter.is_meta:
            dist.broadcast(parameter.detach(), 0)


def _micro_batches(
    indices: list[int], size: int, world: int, rank: int, *, alike: bool
) -> list[tuple[Sequence[int], float]]:
    """The rows of each micro-batch of a process, and their share of the step's rows. With `alike` every process has the same
    number of micro-batches; a process that has too few repeats a row, with a share of 0."""
    own = indices[rank::world]
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


def _resume(state: TrainingState, saver: Checkpoints) -> tuple[int, int]:
    """Load the newest undamaged checkpoint. Returns the number of steps done and how many of them were skipped."""
    found = saver.load(state.tensors())
    if found is None:
        return 0, 0
    skipped = found.get("skipped", 0)
    state.restored(found["step"] - skipped)
    return found["step"], skipped


def _not_finite(found: dict[str, Any], skipped: int, config: DistillConfig, folder: str | None) -> None:
    """Write down the step's rows. Raises NonFiniteError if more steps were skipped than `config` allows."""
    problem = "loss {loss} and gradient norm {grad_norm} at step {step}, rows {rows}".format(**found)
    if folder:
        storage.write_json(storage.join(folder, f"nonfinite-{found['step']:08d}.json"), found)
    if skipped > config.max_skipped_steps:
        raise NonFiniteError(problem, "lower the learning rate, or look at those rows of the data")
    log.warning("step skipped, %d of at most %d: %s", skipped, config.max_skipped_steps, problem)
