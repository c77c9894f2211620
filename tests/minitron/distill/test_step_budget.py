"""The cost of a training step, counted on a CPU: bytes that it moves, bytes that processes exchange, and times that the host
would wait for a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers import tiny
from helpers.distilling import CHANNELS, INTERMEDIATE, live_teacher, load_teacher, pruned_student, stored_teacher
from helpers.meta_step import Stored, like_cuda, meta_model
from helpers.step_counts import StepCounts

from minitron.data import Rows
from minitron.distill import DistillConfig, LiveTeacher, Losses, distill
from minitron.distill.losses import kernels
from minitron.distill.losses.objective import Objective
from minitron.distill.state import TrainingState
from minitron.distill.teacher.top_k import TopKTeacher, store_top_k
from minitron.logits import Head
from minitron.models import layers_of

# four micro-batches, so that what a step does once does not hide what each of them does
CONFIG = DistillConfig(steps=2, batch_rows=4, micro_batch_rows=1, warmup_steps=0)
WITH_LABELS = Losses(cross_entropy=0.5)


def top_k_teacher(folder):
    rows = Rows.open(str(folder / "rows"), "train")
    store_top_k(lambda: load_teacher(folder), rows, str(folder / "top_k"), 8, key="k")
    return TopKTeacher(str(folder / "top_k"), "k")


def bfloat16_teacher(folder):
    return LiveTeacher(load_teacher(folder).to(torch.bfloat16))


def bfloat16_student(folder):
    """The teacher itself: its sizes are multiples of 16, which FP8 needs."""
    return load_teacher(folder).to(torch.bfloat16)


# by name: the student, its teacher, settings, losses, and whether documents are separated
VARIANTS: dict[str, Any] = {
    "stored": (pruned_student, stored_teacher, {}, WITH_LABELS, False),
    "live": (pruned_student, live_teacher, {}, WITH_LABELS, False),
    "documents": (pruned_student, stored_teacher, {}, WITH_LABELS, True),
    "top-k": (pruned_student, top_k_teacher, {}, Losses(top_k=8), False),
    "layers": (pruned_student, live_teacher, {}, INTERMEDIATE, False),
    "recomputed": (pruned_student, stored_teacher, {"activation_checkpointing": "full"}, WITH_LABELS, False),
    "offloaded": (pruned_student, stored_teacher, {"optimizer": "adamw-offload"}, WITH_LABELS, False),
    "8 bits": (pruned_student, stored_teacher, {"optimizer": "adamw-8bit"}, WITH_LABELS, False),
    "bfloat16": (bfloat16_student, bfloat16_teacher, {}, WITH_LABELS, False),
    "fp8": (bfloat16_student, bfloat16_teacher, {"fp8": "tensorwise"}, WITH_LABELS, False),
}
# Bytes per parameter of the student that may be moved. The optimizer's 52 are 32 of AdamW (weight, gradient and two moments in
# float32, read and written), 4 for the norm of the gradient, 8 for clipping and 8 or 6 for rounding into the student.
BUDGETS = {
    "stored": {"forward": 115.2, "loss": 107.9, "backward": 289.1, "optimizer": 52.1},
    "live": {"teacher": 176.4, "forward": 115.2, "loss": 114.9, "backward": 289.1, "optimizer": 52.1},
    "documents": {"forward": 148.3, "loss": 107.9, "backward": 312.0, "optimizer": 52.1},
    "top-k": {"forward": 115.2, "loss": 41.9, "backward": 289.1, "optimizer": 52.1},
    "layers": {"teacher": 176.4, "forward": 115.2, "loss": 229.5, "backward": 328.1, "optimizer": 53.1},
    "recomputed": {"forward": 115.2, "loss": 107.9, "backward": 393.4, "optimizer": 52.1},
    # and 16 from gradients into buffers and from buffers into the student
    "offloaded": {"forward": 115.2, "loss": 107.9, "backward": 289.1, "optimizer": 68.1},
    # torchao's step without the compilation that makes it one pass
    "8 bits": {"forward": 115.2, "loss": 107.9, "backward": 289.1, "optimizer": 160.1},
    "bfloat16": {"teacher": 52.9, "forward": 52.9, "loss": 64.7, "backward": 151.8, "optimizer": 50.1},
    # emulated, and without the compilation that fuses the rounding
    "fp8": {"teacher": 236.2, "forward": 236.2, "loss": 64.7, "backward": 452.5, "optimizer": 50.1},
}
SLACK = (
    1.005  # of a budget: one pass more over all parameters, in one of the four micro-batches or all, is more than that
)


@pytest.fixture(scope="module")
def counted(material):
    """A function that trains a variant, once, and returns its counts and the student."""

    @cache
    def train(variant):
        make_student, make_teacher, settings, losses, separate = VARIANTS[variant]
        student, rows = make_student(material), Rows.open(str(material / "rows"), "train")
        # torchao's optimizer would be compiled by a C++ compiler
        with patch.object(torch, "compile", lambda function, **_: function), StepCounts() as counts:
            distill(
                student,
                make_teacher(material),
                rows,
                replace(CONFIG, **settings),
                losses=losses,
                channels=CHANNELS if losses is INTERMEDIATE else None,
                documents=rows.boundaries if separate else None,
            )
        return counts, student

    return train


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_makes_the_host_wait_once(counted, variant):
    """For the loss and the norm of the gradient, which say whether the step counts. With "adamw-offload" it also waits for
    copies to and from main memory, which test_copies.py counts."""
    counts, _ = counted(variant)
    assert list(counts.waits[1].values()) == [1], counts.waits[1]
    assert next(iter(counts.waits[1])).startswith("tolist in device.py")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_moves_no_more_bytes_than_its_budget(counted, variant):
    counts, student = counted(variant)
    _check(counts.moved[1], student, BUDGETS[variant])


def _check(bytes_moved, student, budgets):
    parameters = sum(parameter.numel() for parameter in student.parameters())
    moved = {part: size / parameters for part, size in bytes_moved.items() if part != "set-up" and size > parameters}
    assert moved.keys() == budgets.keys()
    for part, budget in budgets.items():
        assert moved[part] < SLACK * budget, f"{part}: {moved[part]:.1f} bytes per parameter"


def untied_student(folder):
    return tiny.model(tied=False, num_hidden_layers=2, hidden_size=48).to(torch.bfloat16)


# by name: the student, activation checkpointing, the number of processes, and those of each node (0 without nodes)
SPLIT: dict[str, Any] = {
    "tied": (bfloat16_student, "none", 8, 0),
    "untied": (untied_student, "full", 8, 0),
    "inside nodes": (bfloat16_student, "selective", 16, 8),
}
# as BUDGETS, per parameter of the whole student; copies into and out of what is gathered are among them
SPLIT_BUDGETS = {
    "tied": {"teacher": 87.1, "forward": 86.8, "loss": 64.6, "backward": 178.3, "optimizer": 5.6},
    "untied": {"teacher": 149.9, "forward": 75.4, "loss": 111.2, "backward": 183.4, "optimizer": 5.6},
    "inside nodes": {"teacher": 87.1, "forward": 86.8, "loss": 64.6, "backward": 209.8, "optimizer": 5.6},
}


@pytest.mark.parametrize("variant", SPLIT)
def test_a_step_of_a_split_student_exchanges_what_fsdp_needs(variant, material, processes):
    make_student, recompute, world, node = SPLIT[variant]
    processes(world, node)
    model = load_teacher(material).to(torch.bfloat16)
    with StepCounts() as counts:
        student = distill(
            make_student(material),
            LiveTeacher(model, shard=True),
            Rows.open(str(material / "rows"), "train"),
            replace(CONFIG, batch_rows=4 * world, activation_checkpointing=recompute, shard=True),
            losses=WITH_LABELS,
        )
    shards = node or world
    layers, taught = (_padded(layers_of(each), shards) for each in (student, model))
    parameters = len(list(student.parameters()))
    whole = _padded(student, shards)
    # in each of four micro-batches every unit is gathered in bfloat16 forward, and a layer again backward
    gathered = 4 * 2 * (whole + layers + taught)
    reduced = 4 * 4 * whole  # in float32
    # the parts of the loss, and norms of the gradients; of nodes, once a step the sums of each process's part
    sums = 40 + (4 * whole // shards if node else 0)
    assert counts.exchanged[1] == {
        "_allgather_base_": gathered,
        "_reduce_scatter_base_": reduced,
        "allreduce_": sums,
        "all_reduce": 4 * parameters,
    }
    assert list(counts.waits[1].values()) == [1], counts.waits[1]
    _check(counts.moved[1], student, SPLIT_BUDGETS[variant])


def _padded(module, shards):
    """Number of values of the parameters, each with rows that can be split."""
    return sum(-(-len(each) // shards) * shards * each[0].numel() for each in module.parameters())


class Launches:
    """Takes the place of the loss's kernel: counts its tensors as moved once, and computes nothing."""

    def __init__(self, counts):
        self.counts = counts

    def __getitem__(self, grid):
        return lambda *arguments, **_: self.counts.move(leaf for leaf in arguments if isinstance(leaf, torch.Tensor))


def test_a_step_at_the_sizes_of_a_published_model_moves_no_more_bytes_than_its_budget(monkeypatch):
    """Two layers of Llama 3.1 8B and of a student of 3,072 channels, 4,096 tokens in each of two micro-batches, with the loss
    of a GPU. On the meta device nothing is computed, and it is an error if the host reads a value."""
    config = DistillConfig(steps=1, micro_batch_rows=1)
    with like_cuda(), StepCounts() as counts:
        monkeypatch.setattr(kernels, "logit_loss", Launches(counts))
        student, teacher = (
            meta_model(
                "llama",
                vocab_size=128_256,
                hidden_size=hidden,
                intermediate_size=wide,
                num_hidden_layers=2,
                num_attention_heads=32,
                num_key_value_heads=8,
                head_dim=128,
                tie_word_embeddings=False,
            )
            for hidden, wide in ((3072, 9216), (4096, 14_336))
        )
        objective = Objective(student, Stored(Head.of(teacher)), Losses(), None, counts)
        with TrainingState(objective.trained(), config) as state:
            counts.lap("set-up")
            for _ in range(2):
                tokens = torch.zeros(1, 4096, dtype=torch.int64, device="meta")
                loss, _ = objective([0], tokens)
                loss.backward()
                counts.lap("student")
            state.update(1e-4)
            counts.lap("optimizer")
    # the optimizer's without clipping, which needs a value
    _check(counts.moved[0], student, {"forward": 15.0, "loss": 40.4, "backward": 46.1, "optimizer": 38.0})
