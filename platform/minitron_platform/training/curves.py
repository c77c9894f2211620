"""The curve of a whole training: a JSON file beside the trained model, from which gaps in a record are filled."""

from __future__ import annotations

from minitron import storage
from minitron.distill import read_curve
from minitron_platform.tracking.spool import RunLog


def write_curve(checkpoints: str, path: str) -> None:
    """Write the curve stored in a folder of checkpoints to `path`, as JSON with the lists "step", "train_loss" and
    "train_kl" (in nats per token; "train_kl" is empty if there is no teacher)."""
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
    """Add the steps of the curve at `path` to a record. Those that it lacks, because another run trained them or they were lost
    with the driver, take their place in it; the others are in it already."""
    curve = storage.read_json(path)
    for index, step in enumerate(curve["step"]):
        values = {name: curve[name][index] for name in ("train_loss", "train_kl") if curve[name]}
        log.metrics({**values, "tokens": step * tokens_per_step}, step=step)
