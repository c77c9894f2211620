"""The curve of a whole training: a file beside the trained model, and what a run's record lacks of it."""

from __future__ import annotations

from minitron import storage
from minitron.distill import read_curve
from minitron_platform.tracking.spool import RunLog, recorded_steps


def write_curve(checkpoints: str, path: str) -> None:
    """Assemble the curve kept in a folder of checkpoints as JSON at `path`: "step", "train_loss" and "train_kl", the last
    empty where there is no teacher."""
    points = read_curve(checkpoints)
    storage.write_json(
        path,
        {
            "step": [point.step for point in points],
            "train_loss": [point.loss for point in points],
            "train_kl": [point.kl for point in points if point.kl is not None],
        },
    )


def complete_record(log: RunLog, path: str, tokens_per_step: int) -> None:
    """Write the steps of the curve at `path` that a record lacks, because another run trained them or it was lost."""
    curve, recorded = storage.read_json(path), recorded_steps(log, "train_loss")
    for index, step in enumerate(curve["step"]):
        if step not in recorded:
            values = {name: curve[name][index] for name in ("train_loss", "train_kl") if curve[name]}
            log.metrics({**values, "tokens": step * tokens_per_step}, step=step)
