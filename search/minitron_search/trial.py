"""One candidate's short distillation, from pruning to its held-out KL."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from minitron import storage
from minitron.architecture import Architecture
from minitron.distill import DistillConfig, Losses, StepReport, distill
from minitron.distill.materials import Materials
from minitron.logits import Head
from minitron.origin import Origin

Report = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class SearchTask:
    """What every trial of a search shares. `folder` keeps each trial's checkpoints and result, under its own key; they are
    compared on the first `heldout_rows` held-out rows, by default all."""

    materials: Materials
    origin: Origin
    config: DistillConfig
    losses: Losses
    folder: str
    heldout_rows: int | None = None
    threads: int = 1


def trial_key(architecture: Architecture) -> str:
    """The name of a candidate's trial within its search."""
    return storage.fingerprint(architecture.to_dict())


def trial_result(folder: str, architecture: Architecture) -> dict[str, Any] | None:
    """What a finished trial found, or None."""
    path = storage.join(folder, trial_key(architecture), "result.json")
    return storage.read_json(path) if storage.exists(path) else None


def run_trial(task: SearchTask, architecture: Architecture, report: Report) -> dict[str, Any]:
    """Prune, distil briefly, and measure on the held-out rows; the result is stored and never computed twice.

    A trial that was killed goes on from its last checkpoint. `report` gets {"step", "steps", "train_loss",
    "train_kl", "tokens_per_second"} as it trains, and at the start and the end {"step", "kl", "loss"}.
    """
    found = trial_result(task.folder, architecture)
    if found is not None:
        storage.remove(storage.join(task.folder, trial_key(architecture), "checkpoints"))  # killed just before it could
        return found
    if not torch.cuda.is_available():
        torch.set_num_threads(task.threads)
    started = time.perf_counter()
    materials, folder = task.materials, storage.join(task.folder, trial_key(architecture))
    report({"step": 0, "steps": task.config.steps})
    student, teacher_head = materials.student(task.origin, architecture)
    before = _measured_before(task, folder, student, teacher_head)
    report({"step": 0, "steps": task.config.steps, "kl": before["kl"], "loss": before["loss"]})
    distill(
        student,
        materials.targets("train", teacher_head),
        materials.open_rows("train"),
        task.config,
        losses=task.losses,
        checkpoints=storage.join(folder, "checkpoints"),
        key=trial_key(architecture),
        report=lambda step: report(_metrics(step)),
    )
    after = materials.heldout(student, teacher_head, task.heldout_rows)
    result = {
        "architecture": architecture.to_dict(),
        "parameters": architecture.num_parameters,
        "kl_undistilled": before["kl"],
        "loss_undistilled": before["loss"],
        "kl": after.kl,
        "loss": after.loss,
        "top1_agreement": after.top1_agreement,
        "per_row_kl": after.per_row_kl,
        "tokens": task.config.steps * task.config.batch_rows * materials.open_rows("train").seq_length,
        "config": asdict(task.config),
        "seconds": time.perf_counter() - started,
    }
    storage.write_json(storage.join(folder, "result.json"), result)
    storage.remove(storage.join(folder, "checkpoints"))
    assert after.kl is not None
    report({"step": task.config.steps, "steps": task.config.steps, "kl": after.kl, "loss": after.loss})
    return result


def _measured_before(task: SearchTask, folder: str, student: torch.nn.Module, teacher_head: Head) -> dict[str, Any]:
    path = storage.join(folder, "undistilled.json")
    if not storage.exists(path):
        metrics = task.materials.heldout(student, teacher_head, task.heldout_rows)
        storage.write_json(path, {"kl": metrics.kl, "loss": metrics.loss})
    found: dict[str, Any] = storage.read_json(path)
    return found


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
