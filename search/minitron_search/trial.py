"""One candidate: its score before training, and its short distillation from pruning to its held-out KL."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from minitron import storage
from minitron.architecture import Architecture
from minitron.distill import DistillConfig, Losses, StepReport, distill
from minitron.distill.checkpoints import committed_steps
from minitron.distill.inputs import Materials
from minitron.logits import Head
from minitron.models import quiet_transformers
from minitron.pruning.source import Origin

# Of an architecture, what is listed.
SHAPE = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads")
Report = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class SearchTask:
    """What every trial of a search shares. `folder` keeps each trial's checkpoints and results, under its own key; they are
    compared on the first `heldout_rows` held-out rows, by default all, also after the steps `rungs` (ascending). With
    `keep_weights` the distilled students are kept (see `weights`)."""

    materials: Materials
    origin: Origin
    config: DistillConfig
    losses: Losses
    folder: str
    heldout_rows: int | None = None
    threads: int = 1
    rungs: tuple[int, ...] = ()
    keep_weights: bool = False


def trial_key(architecture: Architecture) -> str:
    """The name of a candidate's trial within its search."""
    return storage.fingerprint(architecture.to_dict())


def trial_result(folder: str, architecture: Architecture) -> dict[str, Any] | None:
    """What a finished trial found, or None."""
    return _read(folder, architecture, "result.json")


def finished_result(task: SearchTask, architecture: Architecture) -> dict[str, Any] | None:
    """What a finished trial found, if it was measured at the task's rungs; else it is to be done again."""
    found = trial_result(task.folder, architecture)
    return found if found and {rung["step"] for rung in found["rungs"]} >= set(task.rungs) else None


def rung_result(folder: str, architecture: Architecture, step: int) -> dict[str, Any] | None:
    """{"step", "kl", "loss", "per_row_kl"} of a candidate after `step` steps, or None."""
    return _read(folder, architecture, _rung_file(step))


def undistilled(folder: str, architecture: Architecture) -> dict[str, Any] | None:
    """{"kl", "loss"} of a candidate before any training, or None."""
    return _read(folder, architecture, "undistilled.json")


def weights(folder: str, architecture: Architecture) -> str:
    """Where a trial keeps its distilled student, a plain transformers checkpoint without its tokenizer."""
    return storage.join(folder, trial_key(architecture), "weights")


def drop_checkpoints(folder: str, architecture: Architecture) -> None:
    """Delete what a trial would go on from."""
    storage.remove(storage.join(folder, trial_key(architecture), "checkpoints"))


def score(task: SearchTask, architecture: Architecture, report: Report) -> None:
    """Cut the candidate out and store its exact held-out KL without training it; `report` gets {"scored": KL}."""
    _use_threads(task)
    source, teacher_head = _source(task.materials, task.origin)
    found = _measured_before(task, architecture, lambda: task.origin.prune(source, architecture), teacher_head)
    report({"scored": found["kl"]})


def run_trial(task: SearchTask, architecture: Architecture, report: Report, *, until: int | None = None) -> None:
    """Prune, distil briefly, and measure on the held-out rows; the result is stored and never computed twice.

    If the task keeps weights and a finished trial's are gone, it is done again, to the same result.
    With `until` the trial pauses after that step, and a later call goes on from there. A trial that was killed goes on from
    its last checkpoint. `report` gets {"step", "steps", "train_loss", "train_kl", "tokens_per_second"} as it trains,
    {"rung", "kl", "loss"} at a rung, {"step", "kl", "loss"} at the start and the end, and {"paused": step}.
    """
    if not ready(task, architecture):
        return
    train(task, architecture, report, until=until)
    if until is None:
        drop_checkpoints(task.folder, architecture)


def ready(task: SearchTask, architecture: Architecture) -> bool:
    """Clear away what a trial cannot go on from; False if it has finished."""
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
    folder = storage.join(task.folder, trial_key(architecture))
    report({"step": 0, "steps": steps})
    student, teacher_head = materials.student(task.origin, architecture)
    before = _measured_before(task, architecture, lambda: student, teacher_head)
    report({"step": 0, "steps": steps, "kl": before["kl"], "loss": before["loss"]})

    def measure(done: int, model: nn.Module) -> None:
        # before the checkpoint of this step is written, so that going on from one never passes a rung by
        found = _measured_at(task, architecture, done, model, teacher_head)
        report({"step": done, "steps": steps, "rung": done, "kl": found["kl"], "loss": found["loss"]})

    distill(
        student,
        materials.targets(teacher_head),
        materials.open_rows("train"),
        task.config,
        losses=task.losses,
        checkpoints=storage.join(folder, "checkpoints"),
        key=trial_key(architecture),
        report=lambda step: report(_metrics(step)),
        evaluate=measure,
        evaluate_at=task.rungs,
        until=until,
    )
    if until is not None:
        report({"step": until, "steps": steps, "paused": until})
        return
    after = materials.heldout(student, teacher_head, task.heldout_rows)
    assert after.kl is not None
    rungs = [found for step in task.rungs if (found := rung_result(task.folder, architecture, step)) is not None]
    result = {
        "architecture": architecture.to_dict(),
        "parameters": architecture.num_parameters,
        "kl_undistilled": before["kl"],
        "loss_undistilled": before["loss"],
        "rungs": [{"step": rung["step"], "kl": rung["kl"]} for rung in rungs],
        "kl": after.kl,
        "loss": after.loss,
        "top1_agreement": after.top1_agreement,
        "per_row_kl": after.per_row_kl,
        "tokens": steps * task.config.batch_rows * materials.open_rows("train").seq_length,
        "config": asdict(task.config),
        "seconds": time.perf_counter() - started,
    }
    if task.keep_weights and _is_first():
        _save_weights(student, weights(task.folder, architecture))
    _write(task, architecture, "result.json", result)
    report({"step": steps, "steps": steps, "kl": after.kl, "loss": after.loss})


def _start_over_if_rungs_were_passed(task: SearchTask, architecture: Architecture) -> None:
    """A checkpoint beyond a rung that was not asked for when it was written can't be gone on from."""
    missing = [step for step in task.rungs if rung_result(task.folder, architecture, step) is None]
    saved = committed_steps(storage.join(task.folder, trial_key(architecture), "checkpoints"))
    if missing and saved and saved[-1] >= missing[0]:
        drop_checkpoints(task.folder, architecture)


def _save_weights(student: nn.Module, target: str) -> None:
    if not storage.is_committed(target):
        with storage.committed_folder(target) as place, quiet_transformers():
            student.save_pretrained(str(place))  # type: ignore[operator]


@lru_cache(maxsize=1)
def _source(materials: Materials, origin: Origin) -> tuple[nn.Module, Head]:
    """Kept in a worker from one candidate to the next."""
    return materials.source(origin)


def _use_threads(task: SearchTask) -> None:
    if not torch.cuda.is_available():
        torch.set_num_threads(task.threads)


def _measured_before(
    task: SearchTask, architecture: Architecture, student: Callable[[], nn.Module], teacher_head: Head
) -> dict[str, Any]:
    found = _agreed(undistilled(task.folder, architecture))
    if found is None:
        metrics = task.materials.heldout(student(), teacher_head, task.heldout_rows)
        found = {"kl": metrics.kl, "loss": metrics.loss}
        _write(task, architecture, "undistilled.json", found)
    return found


def _measured_at(
    task: SearchTask, architecture: Architecture, step: int, student: nn.Module, teacher_head: Head
) -> dict[str, Any]:
    found = _agreed(rung_result(task.folder, architecture, step))
    if found is None:
        metrics = task.materials.heldout(student, teacher_head, task.heldout_rows)
        found = {"step": step, "kl": metrics.kl, "loss": metrics.loss, "per_row_kl": metrics.per_row_kl}
        _write(task, architecture, _rung_file(step), found)
    return found


def _agreed(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the first process has found, in every process, so that all of them measure or none does."""
    if not dist.is_initialized():
        return found
    box = [found]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _write(task: SearchTask, architecture: Architecture, name: str, found: dict[str, Any]) -> None:
    if _is_first():
        storage.write_json(storage.join(task.folder, trial_key(architecture), name), found)


def _is_first() -> bool:
    """Whether this process writes for those that train together."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _rung_file(step: int) -> str:
    return f"rung-{step:06d}.json"


def _read(folder: str, architecture: Architecture, name: str) -> dict[str, Any] | None:
    path = storage.join(folder, trial_key(architecture), name)
    return storage.read_json(path) if storage.exists(path) else None


def _metrics(step: StepReport) -> dict[str, float]:
    return {
        "step": step.step,
        "steps": step.steps,
        "train_loss": step.loss,
        **({"train_kl": step.kl} if step.kl is not None else {}),
        "learning_rate": step.learning_rate,
        "grad_norm": step.grad_norm,
        "tokens_per_second": step.tokens_per_second,
    }
