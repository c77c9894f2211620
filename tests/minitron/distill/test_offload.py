"""The optimizer in main memory, whose copies from and to a GPU are made beside its computation, slice by slice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from minitron.distill import DistillConfig, offload
from minitron.distill.state import TrainingState

CONFIG = DistillConfig(steps=3, optimizer="adamw-offload", weight_decay=0.1)
PLAIN = replace(CONFIG, optimizer="adamw")
SLICE = 64
# more than two slices and a part of one; small ones that are updated together; one that shares a batch with a part; one slice
SHAPES = {"embedding": (15, 12), "norm": (7,), "scale": (), "head": (9, 3), "one": (64,), "wide": (2, 5, 20)}


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(offload, "SLICE_VALUES", SLICE)


def parameters():
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    made["head"] = made["head"].to(torch.float16)
    made["one"] = made["one"].to(torch.bfloat16)
    made["wide"] = made["wide"].to(torch.bfloat16)
    made["turned"] = torch.randn(17, 9, generator=generator).bfloat16().t()  # its values are not one after the other
    return [(name, nn.Parameter(tensor)) for name, tensor in made.items()]


def gradients(step):
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(parameter.shape, generator=generator) for _, parameter in parameters()]


def trained(config, steps=3, state=None):
    """The state after these steps, each with two micro-batches, as the loop takes them."""
    with state or TrainingState(parameters(), config) as state:
        for step in range(steps):
            for part in (1.0, 0.5):
                pairs = zip(state.named, gradients(step), strict=True)
                sum((parameter.float() * gradient).sum() * part for (_, parameter), gradient in pairs).backward()
            state.reduce(torch.zeros(2, dtype=torch.float64))
            state.update(1e-2 / (step + 1))
            assert not any(master.grad is not None for master in state.optimizer.param_groups[0]["params"])
            state.clear()
    return state


def alike(one, other):
    found, expected = one.tensors(), other.tensors()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor), name
    return all(torch.equal(a, b) for (_, a), (_, b) in zip(one.named, other.named, strict=True))


def test_slices_are_updated_to_the_bits_of_whole_tensors_and_go_on_from_them():
    whole = trained(PLAIN)
    own = trained(CONFIG)
    assert len(own.optimizer.param_groups[0]["params"]) > len(own.named)
    assert alike(own, whole)
    for first, second in ((CONFIG, PLAIN), (PLAIN, CONFIG)):
        begun, resumed = trained(first, 2), TrainingState(parameters(), second)
        for name, tensor in resumed.tensors().items():
            tensor.copy_(begun.tensors()[name])
        resumed.restored(2)
        assert alike(resumed, begun)
        for state in (begun, resumed):
            trained(state.config, 1, state)
        assert alike(resumed, begun)


def test_sums_of_gradients_are_let_go_of_as_soon_as_they_are_in_main_memory():
    state = TrainingState(parameters(), CONFIG)
    sums = [gradient if index else None for index, gradient in enumerate(gradients(0))]
    remaining = []
    state.optimizer.register_step_pre_hook(lambda *_: remaining.append(sum(total is not None for total in sums)))
    state.offloaded.update(sums)
    assert sums == [None] * len(SHAPES) + [None]
    # the embedding, which has none, in two slices, and a part with norm and scale; then the head; one; wide in three slices
    # and a part; turned
    assert remaining == [6, 6, 4, 3, 2, 2, 2, 2, 1, 0]
