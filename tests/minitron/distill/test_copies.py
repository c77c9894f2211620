"""Copies from and to a GPU beside its computation, rehearsed on one that makes them as late as it may."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny
from helpers.distilling import stored_teacher
from helpers.late_gpu import MISSING, LateGpu
from torch import nn

from minitron.data import Rows
from minitron.device import values_of
from minitron.distill import DistillConfig, offload
from minitron.distill.checkpoints import Checkpoints
from minitron.distill.feeder import Feeder
from minitron.distill.offload import OffloadedStep
from minitron.distill.state import TrainingState
from minitron.distill.teacher.shard_writing import RowModel, write_shards
from minitron.distill.teacher.shards import Shards


def test_micro_batches_are_there_when_they_are_taken_and_are_kept_while_they_are_used(material, monkeypatch):
    rows, teacher = Rows.open(str(material / "rows"), "train"), stored_teacher(material)
    gpu = LateGpu(monkeypatch)
    parts = [[3, 1], [0, 7], [5]]
    with Feeder(rows, teacher, torch.device("cuda")) as feeder:
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            feeder.expect(part)
            tokens, stored = feeder.take(part, following)
            expected = rows.take(part)
            assert torch.equal(tokens, expected)
            stored.pop("teacher_head")
            wanted = teacher.batch(part, expected)
            assert all(torch.equal(tensor, wanted[name]) for name, tensor in stored.items())
            recorded = [(id(tensor), stream) for tensor, stream in gpu.recorded]
            assert {(id(tensor), gpu.main) for tensor in (tokens, *stored.values())} <= set(recorded)


def test_values_are_read_when_they_are_there(monkeypatch):
    gpu = LateGpu(monkeypatch)
    assert values_of(gpu.holding(torch.tensor([1.0, 2.0]))) == [1.0, 2.0]


def test_a_shard_is_written_when_its_rows_are_there(monkeypatch, tmp_path):
    gpu, rows = LateGpu(monkeypatch), tiny.rows(10)

    class InMemory:
        seq_length = rows.shape[1]

        def __len__(self):
            return len(rows)

        def take(self, indices):
            return rows[list(indices)]

    def compute(tokens):
        return {"hidden": gpu.holding(tokens[..., None] / 2)}

    model = RowModel(torch.nn.Linear(1, 1), compute, row_bytes=4 * InMemory.seq_length)
    write_shards(lambda: model, InMemory(), str(tmp_path), key="k", batch_rows=2, shard_bytes=4 * model.row_bytes)
    assert torch.equal(Shards(str(tmp_path), "k").take(range(10))["hidden"], rows[..., None] / 2)


def test_a_checkpoint_has_what_the_state_was_when_it_was_saved(monkeypatch, tmp_path):
    gpu = LateGpu(monkeypatch)
    state = {"a": gpu.holding(torch.arange(6.0)), "b": gpu.holding(torch.ones(2, 2))}
    with Checkpoints(str(tmp_path), key="k") as saver:
        for step in (1, 2):
            before = {name: tensor.clone() for name, tensor in state.items()}
            saver.save(step, state, {})
            for tensor in state.values():
                tensor.add_(1)
        saver.wait()
        found = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        assert saver.load(found)["step"] == 2
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("early", [False, True])
def test_an_offloaded_step_has_each_gradient_when_it_is_used_and_each_weight_when_the_gpu_computes_on(
    monkeypatch, early
):
    """In seven batches of at most 32 values: 150 and 7 in five, 40 in another dtype in two."""
    monkeypatch.setattr(offload, "SLICE_VALUES", 32)
    config = DistillConfig(steps=3, optimizer="adamw-offload")
    weights = [torch.randn(3, 50), torch.randn(7), torch.randn(40).bfloat16()]
    gradients = [[torch.randn(weight.shape) for weight in weights] for _ in range(3)]

    def begun(tensors):
        state = TrainingState([(str(number), nn.Parameter(tensor)) for number, tensor in enumerate(tensors)], config)
        state.optimizer.param_groups[0]["lr"] = 1e-2
        return state

    def working(state):
        return [parameter.detach().clone() for _, parameter in state.named]

    state, expected = (begun([weight.clone() for weight in weights]) for _ in range(2))
    results = [weights]
    for own in gradients:
        expected.offloaded.update([*own])
        results.append(working(expected))
    gpu = LateGpu(monkeypatch, early=early)

    def computed(tensor):
        """What the GPU is told to compute, and has not computed yet."""
        return gpu.holding(torch.full_like(tensor, MISSING)).copy_(tensor.pin_memory(), non_blocking=True)

    def read(state):
        """What it reads in a computation before."""
        seen = [torch.empty_like(parameter, pin_memory=True) for _, parameter in state.named]
        return [
            own.copy_(parameter.detach(), non_blocking=True)
            for own, (_, parameter) in zip(seen, state.named, strict=True)
        ]

    for _, parameter in state.named:
        gpu.holding(parameter.detach())
    state.offloaded = OffloadedStep([parameter for _, parameter in state.named], state.optimizer)
    for step, own in enumerate(gradients):
        sums, seen, gpu.event_waits = [computed(gradient) for gradient in own], read(state), 0
        state.offloaded.update(sums)
        waits = gpu.event_waits
        assert all(torch.equal(a, b) for a, b in zip(working(state), results[step + 1], strict=True))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(seen, results[step], strict=True))
        assert waits == 7 + (7 if step else 7 - offload.BUFFERS)
    for name, tensor in expected.tensors().items():
        assert torch.equal(state.tensors()[name], tensor)
        state.tensors()[name].mul_(2)
    seen = read(state)
    state.restored(3)
    assert all(torch.equal(a, 2 * b) for a, b in zip(working(state), results[-1], strict=True))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(seen, results[-1], strict=True))
