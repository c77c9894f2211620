"""Models that a stage measures on its workers."""

from __future__ import annotations

from torch import nn

from minitron import storage
from minitron.device import DTYPES, device
from minitron.distill.loading import fit_whole, load_together
from minitron.meta_models import load_onto
from minitron.processes import is_sharded
from minitron_platform.workers.worker import Worker


def load(worker: Worker, folder: str, dtype: str) -> nn.Module:
    """The model of a checkpoint folder, on this process's device; all processes of the call load it.

    If it does not fit on every worker's GPU, its layers are split over the workers, which then have to make equally many
    forward passes.
    """
    local_folder = storage.fetch(folder)
    if worker.count == 1:
        return load_onto(local_folder, DTYPES[dtype], device())
    model = load_together(local_folder, DTYPES[dtype])
    if is_sharded(model):
        worker.progress.say(f"  the model is larger than a GPU: its layers are split over {worker.count} workers")
    return model


def fit(worker: Worker, folders: list[str], dtype: str) -> bool:
    """Whether the models of these checkpoint folders fit together on the GPU of every worker; all processes call this."""
    return worker.count == 1 or fit_whole([storage.fetch(folder) for folder in folders], DTYPES[dtype])
