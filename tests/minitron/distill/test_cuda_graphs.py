"""CUDA graphs of micro-batches. Without a GPU a stand-in calls the recorded function again, with the inputs of the graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.distilling import INTERMEDIATE, live_teacher, load_teacher, pruned_student, stored_teacher

from minitron.data import Rows
from minitron.distill import DistillConfig, LiveTeacher, Losses, StoredTeacher, cuda_graphs, distill
from minitron.distill.state import TrainingState
from minitron.errors import InputError
from minitron.logits import Head

# 5 rows, 2 at a time: the last micro-batch of a step is smaller, and has another share
CONFIG = DistillConfig(steps=6, batch_rows=5, micro_batch_rows=2, peak_lr=1e-3, warmup_steps=1)
LABELS = Losses(cross_entropy=0.5)


def train(folder, make_teacher, config, losses=LABELS):
    """Reports of the steps, and the student's weights."""
    student, reports = pruned_student(folder), []
    distill(
        student,
        make_teacher(folder),
        Rows.open(str(folder / "rows"), "train"),
        config,
        losses=losses,
        report=reports.append,
    )
    return [(each.loss, each.kl, each.cross_entropy, each.grad_norm) for each in reports], student.state_dict()


@pytest.fixture
def recorded(monkeypatch):
    """The sizes of what was recorded; graphs are calls of the recorded function, which nothing but its tensors reach."""
    sizes = []

    def record(work, pool):
        sizes.append(pool)
        return work

    monkeypatch.setattr(cuda_graphs, "available", lambda device: True)
    monkeypatch.setattr(cuda_graphs, "new_pool", lambda: "pool")
    monkeypatch.setattr(cuda_graphs, "record", record)
    return sizes


@pytest.mark.parametrize("make_teacher", [stored_teacher, live_teacher])
def test_a_training_with_graphs_is_the_same(recorded, material, make_teacher):
    steps, weights = train(material, make_teacher, CONFIG)
    assert not recorded
    with_graphs, same_weights = train(material, make_teacher, replace(CONFIG, cuda_graphs=True))
    assert recorded == ["pool", "pool"]  # one of two rows, one of one row
    assert with_graphs == steps
    assert all(torch.equal(weights[name], same_weights[name]) for name in weights)


def test_gradients_are_added_where_the_graph_was_recorded(recorded, material, monkeypatch):
    addresses = []
    add = TrainingState._add

    def watched(state, index, parameter):
        add(state, index, parameter)
        addresses.append((index, state._sums[index].data_ptr()))

    monkeypatch.setattr(TrainingState, "_add", watched)
    train(material, stored_teacher, replace(CONFIG, cuda_graphs=True))
    assert len({*addresses}) == len({index for index, _ in addresses})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"shard": True}, "cuda_graphs with shard"),
        ({"fp8": "rowwise"}, "cuda_graphs with fp8: rowwise"),
        ({"optimizer": "adamw-offload"}, "cuda_graphs with optimizer: adamw-offload"),
    ],
)
def test_settings_that_graphs_cannot_have_are_refused(settings, named):
    with pytest.raises(InputError, match=named):
        replace(CONFIG, cuda_graphs=True, **settings)


def test_losses_on_layers_are_refused(recorded, material):
    with pytest.raises(InputError, match="cuda_graphs: losses on layers"):
        train(material, live_teacher, replace(CONFIG, cuda_graphs=True), INTERMEDIATE)


def train_on_gpu(folder, dtype, live, config):
    """Losses of the steps, and the parts of the last step's time."""
    student, teacher = (model.to("cuda", dtype) for model in (pruned_student(folder), load_teacher(folder)))
    targets = LiveTeacher(teacher) if live else StoredTeacher(str(folder / "hidden"), Head.of(teacher), "k")
    reports = []
    rows = Rows.open(str(folder / "rows"), "train")
    distill(student, targets, rows, config, losses=LABELS, report=reports.append)
    return torch.tensor([each.loss for each in reports]), reports[-1].seconds


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "live"), [(torch.float32, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_computes_the_same(material, dtype, live, compiled):
    config = replace(CONFIG, steps=12, compile=compiled)
    losses, parts = train_on_gpu(material, dtype, live, config)
    with_graphs, parts_with_graphs = train_on_gpu(material, dtype, live, replace(config, cuda_graphs=True))
    # kernels add gradients of attention in any order
    torch.testing.assert_close(with_graphs, losses, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=0)
    assert parts["loss"] > 0
    assert parts_with_graphs["loss"] == 0  # in a graph it is not told apart from the layers
