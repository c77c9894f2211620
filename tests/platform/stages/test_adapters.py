"""A teacher's correction by adapters in the workers of a run: one, and two that share it."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from minitron.checkpoints.files import Checkpoint
from minitron.distill import DistillConfig, Losses
from minitron.distill.inputs import DistillInputs
from minitron.models import load_model
from minitron_platform.console import Console
from minitron_platform.training.events import Measured
from minitron_platform.training.train import TrainTask, train
from minitron_platform.workers.worker import Worker

CONFIG = DistillConfig(steps=4, batch_rows=4, micro_batch_rows=1, warmup_steps=1, peak_lr=1e-2, evaluate_every=2)

LOSSES = ("train_loss", "heldout_loss")


def _train(task, rank, world, said):
    """Train in a group of processes; says the losses and the number of values that were read of the model."""
    losses, read, rows = {}, [], Checkpoint.rows

    def counted(*arguments):
        read.append(rows(*arguments))
        return read[-1]

    def send(event):
        if isinstance(event, Measured):
            losses.update({f"{event.step} {name}": event.values[name] for name in LOSSES if name in event.values})

    dist.init_process_group("gloo", rank=rank, world_size=world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "rows", counted)
        assert train(task, Worker(rank, world, Console(), send)) is None
    dist.destroy_process_group()
    said.write_text(json.dumps([losses, sum(tensor.numel() for tensor in read)]))


def test_workers_that_share_a_model_read_their_parts_and_write_what_one_worker_does(
    material, tmp_path, monkeypatch, free_port
):
    inputs = DistillInputs(str(material / "teacher"), "t", "float32", str(material / "rows"), "", "")
    corrected = {}
    for world in (1, 2):
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(free_port()))
        files = {name: str(tmp_path / f"{name}-{world}") for name in ("checkpoints", "curve", "result")}
        config = replace(CONFIG, shard=world > 1)
        losses = Losses(logits="none", cross_entropy=1.0)
        task = TrainTask(inputs, config, losses, **files, key="key", method="lora", lora_rank=3)
        fork = multiprocessing.get_context("fork")
        said = [tmp_path / f"{world}-{rank}.json" for rank in range(world)]
        workers = [
            fork.Process(target=_train, args=(task, rank, world, said[rank]), daemon=True) for rank in range(world)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout=120)
        assert [worker.exitcode for worker in workers] == [0] * world
        measured, read = zip(*(json.loads(path.read_text()) for path in said), strict=True)
        corrected[world] = measured[0], read, load_model(files["result"])
    one, two = corrected[1], corrected[2]
    assert len(one[0]) == 4 + 2  # of the steps, and of the evaluations
    assert two[0] == pytest.approx(one[0], rel=1e-5)
    size = sum(parameter.numel() for parameter in one[2].parameters())
    assert two[1] == pytest.approx([size / 2] * 2, rel=0.02)
    before = load_model(inputs.teacher)
    for name, parameter in one[2].named_parameters():
        assert torch.allclose(two[2].get_parameter(name), parameter, atol=1e-5)
        assert torch.equal(parameter, before.get_parameter(name)) == (parameter.ndim == 1 or "embed" in name)
